/* How work is shared. */
#ifndef NORMPROP_THREADS_H
#define NORMPROP_THREADS_H

/* Runs `body(data)` on so many threads at once and returns when all have; NULL where there is none. */
typedef void (*parallel_t)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

#endif
