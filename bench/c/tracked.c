// A process whose memory is tracked.
//
// It opens a userfaultfd, sends it to the tracker at the other end of descriptor 3,
// and does what that says: for each byte 'd' it writes to pages, and says so; for
// 'e' it ends. It prints how long the writes took after the last 'd', as the client
// does; wrong is the number of pages that have other contents than they should.
// Arguments:
//
//	pages=
//	part=N         how many thousandths of the pages are written, chosen at random
//	features=BITS  of the userfaultfd; 0: nobody tracks
//	gap=NS         writes all the time, so far apart, until 'e'
#include "common.h"

enum { PAGE = 4096, MOST = 1 << 20 }; // MOST writes are measured

static uint64_t pages, part, gap, n;
static volatile char *mem;
static char *want; // contents of each page
static uint64_t *order, *took;
static int over;

static void write_page(uint64_t i)
{
	uint64_t begin = now();
	mem[i * PAGE]++;
	uint64_t end = now();
	want[i]++;
	if (n < MOST)
		took[n++] = end - begin;
}

static void write_part(void)
{
	n = 0;
	for (uint64_t i = 0; i < pages * part / 1000; i++)
		write_page(order[i]);
}

static void *write_on(void *arg)
{
	while (!__atomic_load_n(&over, __ATOMIC_RELAXED)) {
		uint64_t next = now() + gap;
		write_page(random() % pages);
		while (now() < next)
			;
	}
	return arg;
}

static void fill(void)
{
	for (uint64_t i = 0; i < pages; i++) {
		mem[i * PAGE] = want[i] = 1;
		order[i] = i;
	}
	for (uint64_t i = 0; i < pages; i++) {
		uint64_t j = i + random() % (pages - i), x = order[i];
		order[i] = order[j];
		order[j] = x;
	}
}

int main(int argc, char **argv)
{
	(void)argc;
	pages = number(argv, "pages", 1024);
	part = number(argv, "part", 1000);
	gap = number(argv, "gap", 0);
	uint64_t features = number(argv, "features", 0);
	mem = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mem == MAP_FAILED)
		die("mmap");
	madvise((void *)mem, pages * PAGE, MADV_NOHUGEPAGE);
	want = malloc(pages);
	order = malloc(pages * sizeof *order);
	took = malloc(MOST * sizeof *took);
	memset(took, 1, MOST * sizeof *took); // so that it is there
	fill();

	uint64_t begin = now();
	if (!features) {
		write_part();
	} else {
		int uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
		struct uffdio_api api = { UFFD_API, features, 0 };
		if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
			die("userfaultfd");
		pthread_t writer;
		if (gap && pthread_create(&writer, 0, write_on, 0))
			die("pthread_create");
		hand(uffd, (struct hello){ (uintptr_t)mem, pages * PAGE, PAGE, 0, getpid() });
		char c;
		while (read(SOCKET, &c, 1) == 1 && c == 'd') {
			write_part();
			if (write(SOCKET, &c, 1) != 1)
				die("write");
		}
		__atomic_store_n(&over, 1, __ATOMIC_RELAXED);
		if (gap)
			pthread_join(writer, 0);
	}
	uint64_t total = now() - begin, wrong = 0;
	for (uint64_t i = 0; i < pages; i++)
		wrong += mem[i * PAGE] != want[i];
	report(took, n, total, wrong);
	_exit(0);
}
