/*
 * A page fault resolved in the signal handler of the thread that faults, as C
 * does it: what lazymem is measured against. Prints the median of the faults'
 * times in ns, the speed of a sequential read with a window in MB/s, and the
 * time of a memcpy of a resident page in ns.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int uffd;
static char *mem, *data;
static size_t size, page, window;

static void must(int ok, const char *what)
{
	if (!ok) {
		perror(what);
		exit(1);
	}
}

static void resolve(int sig, siginfo_t *info, void *context)
{
	size_t off = ((char *)info->si_addr - mem) / window * window;
	struct uffdio_copy copy = {
		.dst = (uintptr_t)(mem + off),
		.src = (uintptr_t)(data + off),
		.len = window,
		.mode = UFFDIO_COPY_MODE_DONTWAKE,
	};
	if (ioctl(uffd, UFFDIO_COPY, &copy) != 0)
		_exit(2);
}

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int order(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return x < y ? -1 : x > y;
}

static void empty(void)
{
	must(madvise(mem, size, MADV_DONTNEED) == 0, "madvise");
}

int main(int argc, char **argv)
{
	must(argc == 4, "usage: sigbus BYTES WINDOW ROUNDS");
	size = strtoull(argv[1], NULL, 0);
	size_t sequential = strtoull(argv[2], NULL, 0);
	int rounds = atoi(argv[3]);
	page = getpagesize();
	size_t pages = size / page;

	uffd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	must(uffd >= 0, "userfaultfd");
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_SIGBUS };
	must(ioctl(uffd, UFFDIO_API, &api) == 0, "UFFDIO_API");
	data = malloc(size);
	for (size_t i = 0; i < size; i++)
		data[i] = i / page + 1;
	mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(mem != MAP_FAILED, "mmap");
	struct uffdio_register reg = {
		.range = { (uintptr_t)mem, size },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	must(ioctl(uffd, UFFDIO_REGISTER, &reg) == 0, "UFFDIO_REGISTER");
	struct sigaction action = { .sa_sigaction = resolve, .sa_flags = SA_SIGINFO };
	must(sigaction(SIGBUS, &action, NULL) == 0, "sigaction");

	uint64_t *took = malloc(pages * rounds * sizeof *took);
	size_t n = 0;
	window = page;
	for (int r = 0; r < rounds; r++) {
		empty();
		for (size_t i = 0; i < pages; i++) {
			size_t p = i * 613 % pages;
			uint64_t start = now();
			char c = *(volatile char *)(mem + p * page);
			took[n++] = now() - start;
			if (c != (char)(p + 1))
				return 3;
		}
	}
	qsort(took, n, sizeof *took, order);

	char *buf = malloc(page);
	window = sequential;
	uint64_t best = UINT64_MAX;
	for (int r = 0; r < rounds; r++) {
		empty();
		uint64_t start = now();
		for (size_t off = 0; off < size; off += page)
			memcpy(buf, mem + off, page);
		uint64_t t = now() - start;
		if (t < best)
			best = t;
	}

	uint64_t start = now();
	for (int i = 0; i < 1000000; i++) {
		memcpy(buf, mem + i % 64 * page, page);
		__asm__ volatile("" : : "r"(buf) : "memory");
	}
	printf("%llu %llu %.1f\n", (unsigned long long)took[n / 2],
	       (unsigned long long)(size * 1000 / best), (now() - start) / 1e6);
	return 0;
}
