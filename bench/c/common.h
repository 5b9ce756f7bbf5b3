// What the client and the handler share.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SOCKET = 3 }; // a descriptor: the client's and the handler's ends of a pair

// How faults are resolved.
enum { COPY = 1, ZEROPAGE, CONTINUE, WRITEPROTECT, MOVE };

// What the client tells the handler, along with the userfaultfd.
struct hello {
	uint64_t start, length, page, op;
};

// struct uffdio_move and its request, which came with Linux 6.8: headers may be older.
struct move {
	uint64_t dst, src, len, mode;
	int64_t done;
};
#define MOVE_REQUEST _IOWR(UFFDIO, 5, struct move)

static inline void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

static inline uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

// option returns the value of an argument NAME=VALUE, or what it is otherwise.
static inline const char *option(char **argv, const char *name, const char *otherwise)
{
	size_t n = strlen(name);
	for (argv++; *argv; argv++)
		if (!strncmp(*argv, name, n) && (*argv)[n] == '=')
			return *argv + n + 1;
	return otherwise;
}

static inline uint64_t number(char **argv, const char *name, uint64_t otherwise)
{
	const char *v = option(argv, name, 0);
	return v ? strtoull(v, 0, 0) : otherwise;
}
