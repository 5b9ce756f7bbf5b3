// A process that tracks which pages of another one are written, with the bare
// ioctls. It prints how long the collections took, as the client does for its
// faults. Arguments:
//
//	part=N    how many thousandths of the pages the other process writes
//	rounds=N  collections; 0: it prints how long it took to protect the memory
//	sync=1    no collections: it answers a fault for each first write
#include "common.h"

// The parts of the kernel's headers that those of older systems lack.
#define SCAN _IOWR('f', 16, struct scan)
#define WRITTEN 2
#define WP_MATCHING 1

struct scan {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t inverted, mask, anyof, returned;
};

static struct {
	uint64_t start, end, categories;
} regions[4096];

static struct hello hello;
static int uffd, pagemap;

// collect returns how many pages are written, and protects them again.
static uint64_t collect(void)
{
	struct scan scan = {
		.size = sizeof scan, .flags = WP_MATCHING,
		.start = hello.start, .end = hello.start + hello.length,
		.vec = (uintptr_t)regions, .vec_len = sizeof regions / sizeof *regions,
		.mask = WRITTEN, .returned = WRITTEN,
	};
	uint64_t bytes = 0;
	while (scan.start < scan.end) {
		int found = ioctl(pagemap, SCAN, &scan);
		if (found < 0)
			die("PAGEMAP_SCAN");
		for (int i = 0; i < found; i++)
			bytes += regions[i].end - regions[i].start;
		scan.start = scan.walk_end;
	}
	return bytes / hello.page;
}

static void protect(void)
{
	struct uffdio_register reg = { { hello.start, hello.length }, UFFDIO_REGISTER_MODE_WP, 0 };
	struct uffdio_writeprotect wp = { reg.range, UFFDIO_WRITEPROTECT_MODE_WP };
	if (ioctl(uffd, UFFDIO_REGISTER, &reg) || ioctl(uffd, UFFDIO_WRITEPROTECT, &wp))
		die("write-protecting");
}

// serve has the other process write, and answers its faults until it is killed.
static void serve(void)
{
	if (write(SOCKET, "de", 2) != 2)
		die("write");
	struct uffd_msg m;
	while (read(uffd, &m, sizeof m) == sizeof m) {
		struct uffdio_writeprotect wp = { { m.arg.pagefault.address & -hello.page, hello.page }, 0 };
		if (m.event == UFFD_EVENT_PAGEFAULT && ioctl(uffd, UFFDIO_WRITEPROTECT, &wp))
			die("UFFDIO_WRITEPROTECT");
	}
}

int main(int argc, char **argv)
{
	(void)argc;
	uint64_t part = number(argv, "part", 1000), rounds = number(argv, "rounds", 1);
	char name[64], c;
	uffd = receive(&hello);
	uint64_t begin = now();
	protect();
	uint64_t took[rounds + 1], total = 0;
	took[0] = now() - begin;
	if (write(SOCKET, "r", 1) != 1)
		die("write");
	if (number(argv, "sync", 0))
		serve();
	snprintf(name, sizeof name, "/proc/%lu/pagemap", hello.pid);
	pagemap = open(name, O_RDONLY | O_CLOEXEC);
	if (pagemap < 0)
		die(name);
	for (uint64_t r = 0; r < rounds; r++) {
		if (write(SOCKET, "d", 1) != 1 || read(SOCKET, &c, 1) != 1)
			die("having pages written");
		begin = now();
		uint64_t pages = collect();
		took[r] = now() - begin;
		total += took[r];
		if (pages != hello.length / hello.page * part / 1000) {
			fprintf(stderr, "%lu pages are written\n", pages);
			return 1;
		}
	}
	report(took, rounds ? rounds : 1, rounds ? total : took[0], 0);
	if (write(SOCKET, "e", 1) != 1)
		die("write");
	return 0;
}
