// Write-protects 1 GiB with UFFD_FEATURE_WP_ASYNC. For each number that it reads,
// it writes to so many thousandths of the pages, chosen at random, collects what
// is written with PAGEMAP_SCAN, and prints the nanoseconds that the collection
// took: by the clock, and on the processor.

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

// The parts of the kernel's headers that those of older systems lack.
#define WP_ASYNC (1 << 15)
#define SCAN _IOWR('f', 16, struct scan)
#define WRITTEN 2
#define WP_MATCHING 1

struct scan {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t inverted, mask, anyof, returned;
};

struct region {
	uint64_t start, end, categories;
};

static struct region regions[4096];

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

int main(void)
{
	size_t page = getpagesize(), size = 1ul << 30, n = size / page;
	size_t *order = malloc(n * sizeof *order);
	volatile char *mem = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mem == MAP_FAILED)
		die("mmap");
	for (size_t i = 0; i < n; i++) {
		mem[i * page] = 1;
		order[i] = i;
	}
	for (size_t i = 0; i < n; i++) {
		size_t j = i + random() % (n - i), t = order[i];
		order[i] = order[j];
		order[j] = t;
	}

	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	struct uffdio_api api = {.api = UFFD_API, .features = WP_ASYNC};
	if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
		die("userfaultfd");
	struct uffdio_register reg = {.range = {(uintptr_t)mem, size}, .mode = UFFDIO_REGISTER_MODE_WP};
	struct uffdio_writeprotect wp = {.range = {(uintptr_t)mem, size}, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
	if (ioctl(fd, UFFDIO_REGISTER, &reg) || ioctl(fd, UFFDIO_WRITEPROTECT, &wp))
		die("write-protecting");
	int pagemap = open("/proc/self/pagemap", O_RDONLY);
	if (pagemap < 0)
		die("pagemap");

	int part;
	while (scanf("%d", &part) == 1) {
		size_t dirty = n * part / 1000;
		for (size_t i = 0; i < dirty; i++)
			mem[order[i] * page]++;
		uint64_t wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_THREAD_CPUTIME_ID);
		struct scan scan = {
			.size = sizeof scan, .flags = WP_MATCHING,
			.start = (uintptr_t)mem, .end = (uintptr_t)mem + size,
			.vec = (uintptr_t)regions, .vec_len = sizeof regions / sizeof *regions,
			.mask = WRITTEN, .returned = WRITTEN,
		};
		size_t pages = 0;
		while (scan.start < scan.end) {
			int found = ioctl(pagemap, SCAN, &scan);
			if (found < 0)
				die("PAGEMAP_SCAN");
			for (int i = 0; i < found; i++)
				pages += (regions[i].end - regions[i].start) / page;
			scan.start = scan.walk_end;
		}
		cpu = now(CLOCK_THREAD_CPUTIME_ID) - cpu;
		wall = now(CLOCK_MONOTONIC) - wall;
		if (pages != dirty) {
			fprintf(stderr, "%zu pages are written, want %zu\n", pages, dirty);
			return 1;
		}
		printf("%llu %llu\n", (unsigned long long)wall, (unsigned long long)cpu);
		fflush(stdout);
	}
}
