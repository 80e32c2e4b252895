"""Results as text: tables, pages of HTML and Markdown."""
