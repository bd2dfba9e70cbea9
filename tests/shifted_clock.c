/* Shifts a process's wall clock by CLOCK_SHIFT_S seconds, preloaded (LD_PRELOAD). The steady clock stays as it is.

   Where a call is given a time of the wall clock to wait for, the kernel is told the true one. libfaketime does not:
   of 0.9.10, with the steady clock shifted too, a wait of Python's threads does not end; without, time.sleep fails. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(name)                                                          \
    ({                                                                      \
        static __typeof__(&name) real_##name;                               \
        if (!real_##name) real_##name = dlsym(RTLD_NEXT, #name);            \
        real_##name;                                                        \
    })
#define YEARS_30 1000000000 /* a steady clock, which counts from the start of the machine, says less */

static time_t shift(void) {
    static time_t found;
    static int looked;
    if (!looked) {
        const char *said = getenv("CLOCK_SHIFT_S");
        found = said ? atol(said) : 0;
        looked = 1;
    }
    return found;
}

static int is_wall(clockid_t clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE; }

static struct timespec unshifted(const struct timespec *until) {
    struct timespec real = *until;
    real.tv_sec -= shift();
    return real;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = REAL(clock_gettime)(clock, now);
    if (!failed && is_wall(clock)) now->tv_sec += shift();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec found;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}

int timespec_get(struct timespec *now, int base) {
    if (base == TIME_UTC) clock_gettime(CLOCK_REALTIME, now);
    return base == TIME_UTC ? base : 0;
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
    struct timespec real = unshifted(until);
    return REAL(clock_nanosleep)(clock, flags, is_wall(clock) && (flags & TIMER_ABSTIME) ? &real : until, left);
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    struct timespec real = unshifted(until);
    return REAL(sem_timedwait)(semaphore, &real);
}

int sem_clockwait(sem_t *semaphore, clockid_t clock, const struct timespec *until) {
    struct timespec real = unshifted(until);
    return REAL(sem_clockwait)(semaphore, clock, is_wall(clock) ? &real : until);
}

int pthread_mutex_timedlock(pthread_mutex_t *mutex, const struct timespec *until) {
    struct timespec real = unshifted(until);
    return REAL(pthread_mutex_timedlock)(mutex, &real);
}

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
    struct timespec real = unshifted(until);
    return REAL(pthread_cond_timedwait)(condition, mutex, until->tv_sec > YEARS_30 ? &real : until);
}

int pthread_cond_clockwait(
    pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until) {
    struct timespec real = unshifted(until);
    return REAL(pthread_cond_clockwait)(condition, mutex, clock, is_wall(clock) ? &real : until);
}

long syscall(long number, ...) { /* Abseil, which Ray is built with, waits by futex itself */
    long given[6];
    va_list arguments;
    va_start(arguments, number);
    for (int i = 0; i < 6; i++) given[i] = va_arg(arguments, long);
    va_end(arguments);
    struct timespec real;
    if (number == SYS_futex && (given[1] & FUTEX_CLOCK_REALTIME) && given[3]) {
        real = unshifted((const struct timespec *)given[3]);
        given[3] = (long)&real;
    }
    return REAL(syscall)(number, given[0], given[1], given[2], given[3], given[4], given[5]);
}
