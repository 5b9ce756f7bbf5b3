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
	uint64_t start, length, page, op, pid;
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

// hand sends the userfaultfd to the handler, and waits until it is ready.
static inline void hand(int uffd, struct hello hello)
{
	struct iovec iov = { &hello, sizeof hello };
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof uffd)];
	} control = { 0 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control };
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof uffd);
	memcpy(CMSG_DATA(c), &uffd, sizeof uffd);
	char ready;
	if (sendmsg(SOCKET, &msg, 0) != sizeof hello || read(SOCKET, &ready, 1) != 1)
		die("handing over");
}

// receive is the handler's side of it. It returns the userfaultfd.
static inline int receive(struct hello *hello)
{
	int uffd;
	struct iovec iov = { hello, sizeof *hello };
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof uffd)];
	} control;
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control };
	if (recvmsg(SOCKET, &msg, 0) != sizeof *hello || !CMSG_FIRSTHDR(&msg))
		die("receiving");
	memcpy(&uffd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof uffd);
	return uffd;
}

static inline int ascending(const void *a, const void *b)
{
	uint64_t x = *(uint64_t *)a, y = *(uint64_t *)b;
	return x < y ? -1 : x > y;
}

// report prints n times, their sum or how long all of it took, and what was wrong.
static inline void report(uint64_t *took, uint64_t n, uint64_t total, uint64_t wrong)
{
	qsort(took, n, sizeof *took, ascending);
	printf("%lu %lu %lu %lu %lu %lu %lu\n", n, total, took[n / 2], took[n * 99 / 100], took[n * 999 / 1000],
	       took[n - 1], wrong);
	fflush(stdout);
}
