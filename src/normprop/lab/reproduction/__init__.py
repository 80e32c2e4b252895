"""The experiments of Arpit et al. 2016, section 5, as data: runs, published numbers, tables."""
