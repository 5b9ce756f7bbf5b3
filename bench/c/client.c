// A process that faults, and measures how long each fault takes.
//
// It registers memory, sends the userfaultfd to the handler at the other end of
// descriptor 3, touches one page after the other, checks what it finds, and
// prints
//
//	faults nanoseconds p50 p99 p99.9 longest wrong
//
// where nanoseconds is the time from the first touch to the last, and wrong the
// number of pages with other contents than they should have. Arguments:
//
//	op=copy|zeropage|continue|wp   what the handler does for a fault
//	op=move                        moves pages, in a thread of this process
//	op=bulk                        lets the handler fill the memory: see bulk
//	op=memcpy|touch                no faults to handle: see plain
//	huge=1                         2 MiB pages of hugetlb
//	pages= rounds= threads=
//	gap=NS                         time between two faults of a thread, spent computing
//	sleep=1                        or asleep
//	all=1                          read all of each page
//	scatter=1                      go through the memory in leaps
//	rr=1                           be preferred to whatever else runs
#include "common.h"

static uint64_t pages, rounds, threads, gap, page = 4096, op;
static int sleeps, all, scatter, uffd;
static char *mem, *second; // second: another mapping of it, or what to move
static uint64_t *took, *began, *ended; // of each access; of each thread
static pthread_barrier_t start, stop;
static uint64_t wrong;

// Every word of the memory is to be the number of its 4 KiB, from 1 on.
static void fill(char *m)
{
	for (uint64_t i = 0; i < pages * page / 4096; i++)
		for (int w = 0; w < 512; w++)
			((uint64_t *)(m + i * 4096))[w] = i + 1;
}

static uint64_t want(uint64_t i)
{
	return op == ZEROPAGE ? 0 : i * (page / 4096) + 1;
}

static void discard(void)
{
	if (madvise(mem, pages * page, MADV_DONTNEED))
		die("madvise");
}

// renew makes all pages fault again.
static void renew(void)
{
	if (op == MOVE)
		fill(second);
	if (op != WRITEPROTECT) {
		discard();
		return;
	}
	struct uffdio_writeprotect wp = { { (uintptr_t)mem, pages * page }, UFFDIO_WRITEPROTECT_MODE_WP };
	fill(mem);
	if (ioctl(uffd, UFFDIO_WRITEPROTECT, &wp))
		die("UFFDIO_WRITEPROTECT");
}

static void idle(uint64_t since)
{
	if (!gap)
		return;
	uint64_t until = since + gap;
	if (sleeps) {
		struct timespec t = { until / 1000000000, until % 1000000000 };
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, 0);
		return;
	}
	while (now() < until)
		;
}

// access touches page i, and reports whether its contents are right.
static int access_page(uint64_t i)
{
	volatile uint64_t *p = (uint64_t *)(mem + i * page);
	volatile uint64_t *word = p + i % 512;
	if (op == WRITEPROTECT) {
		*word = i;
		return p[(i + 1) % 512] == want(i);
	}
	if (!all)
		return *word == want(i);
	uint64_t bad = 0;
	for (int w = 0; w < 512; w += 8)
		bad |= p[w] ^ want(i);
	return !bad;
}

static void *faulter(void *arg)
{
	uint64_t t = (uintptr_t)arg, part = pages / threads;
	for (uint64_t r = 0; r < rounds; r++) {
		pthread_barrier_wait(&start);
		uint64_t bad = 0, end = began[t] = now();
		for (uint64_t n = t * part; n < (t + 1) * part; n++) {
			uint64_t i = scatter ? n * 7919 % pages : n;
			idle(end);
			uint64_t begin = now();
			bad += !access_page(i);
			end = now();
			took[r * pages + n] = end - begin;
		}
		ended[t] = end;
		__atomic_add_fetch(&wrong, bad, __ATOMIC_RELAXED);
		pthread_barrier_wait(&stop);
	}
	return 0;
}

static void measure(void)
{
	uint64_t n = pages * rounds, total = 0;
	took = calloc(n, sizeof *took);
	memset(took, 1, n * sizeof *took); // so that it is there
	began = calloc(threads, sizeof *began);
	ended = calloc(threads, sizeof *ended);
	pthread_barrier_init(&start, 0, threads + 1);
	pthread_barrier_init(&stop, 0, threads + 1);
	pthread_t ids[threads];
	for (uint64_t t = 0; t < threads; t++)
		pthread_create(&ids[t], 0, faulter, (void *)(uintptr_t)t);
	for (uint64_t r = 0; r < rounds; r++) {
		renew();
		pthread_barrier_wait(&start);
		pthread_barrier_wait(&stop);
		// This thread may have been woken long after the others had begun.
		uint64_t first = began[0], last = ended[0];
		for (uint64_t t = 1; t < threads; t++) {
			first = began[t] < first ? began[t] : first;
			last = ended[t] > last ? ended[t] : last;
		}
		total += last - first;
	}
	for (uint64_t t = 0; t < threads; t++)
		pthread_join(ids[t], 0);
	report(took, n, total, wrong);
}

// bulk discards the memory whenever the handler sends a byte, and says so. At the
// end it checks what the handler made of it.
static void bulk(void)
{
	char c;
	while (read(SOCKET, &c, 1) == 1) {
		discard();
		if (write(SOCKET, &c, 1) != 1)
			die("write");
		if (c == 'e')
			break;
	}
	if (read(SOCKET, &c, 1) != 1)
		die("read");
	for (uint64_t i = 0; i < pages; i++)
		wrong += !access_page(i);
	printf("0 0 0 0 0 0 %lu\n", wrong);
}

// plain fills the memory itself, which may be there or not, and prints bytes for
// faults.
static void plain(int copies)
{
	uint64_t total = 0;
	fill(second);
	if (copies)
		memset(mem, 1, pages * page);
	for (uint64_t r = 0; r < rounds; r++) {
		if (!copies)
			discard();
		uint64_t begin = now();
		if (copies)
			memcpy(mem, second, pages * page);
		else
			for (uint64_t i = 0; i < pages; i++)
				memcpy(mem + i * page, second + i * page, page);
		total += now() - begin;
	}
	printf("%lu %lu 0 0 0 0 0\n", pages * page * rounds, total);
}

static void *mover(void *arg)
{
	struct uffd_msg m;
	while (read(uffd, &m, sizeof m) == sizeof m) {
		uint64_t at = m.arg.pagefault.address & -page;
		struct move move = { at, (uintptr_t)second + (at - (uintptr_t)mem), page, 0, 0 };
		if (ioctl(uffd, MOVE_REQUEST, &move))
			die("UFFDIO_MOVE");
	}
	return arg;
}

static char *map(int flags, int fd)
{
	char *m = mmap(0, pages * page, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (m == MAP_FAILED)
		die("mmap");
	madvise(m, pages * page, MADV_NOHUGEPAGE);
	return m;
}

static void open_uffd(uint64_t mode)
{
	uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
	struct uffdio_api api = { UFFD_API, 0, 0 };
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		die("userfaultfd");
	struct uffdio_register reg = { { (uintptr_t)mem, pages * page }, mode, 0 };
	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		die("UFFDIO_REGISTER");
}

int main(int argc, char **argv)
{
	(void)argc;
	const char *what = option(argv, "op", "copy");
	pages = number(argv, "pages", 1024);
	rounds = number(argv, "rounds", 1);
	threads = number(argv, "threads", 1);
	gap = number(argv, "gap", 0);
	sleeps = number(argv, "sleep", 0);
	all = number(argv, "all", 0);
	scatter = number(argv, "scatter", 0);
	int flags = MAP_PRIVATE | MAP_ANONYMOUS, fd = -1;
	if (number(argv, "huge", 0)) {
		page = 2 << 20;
		flags |= MAP_HUGETLB;
	}
	if (sleeps)
		prctl(PR_SET_TIMERSLACK, 1);
	struct sched_param param = { 1 };
	if (number(argv, "rr", 0) && sched_setscheduler(0, SCHED_RR, &param))
		die("SCHED_RR");

	uint64_t mode = UFFDIO_REGISTER_MODE_MISSING;
	op = COPY;
	if (!strcmp(what, "zeropage")) {
		op = ZEROPAGE;
	} else if (!strcmp(what, "wp")) {
		op = WRITEPROTECT;
		mode = UFFDIO_REGISTER_MODE_WP;
	} else if (!strcmp(what, "continue")) {
		op = CONTINUE;
		mode = UFFDIO_REGISTER_MODE_MINOR;
		fd = memfd_create("bench", MFD_CLOEXEC);
		flags = MAP_SHARED;
		if (fd < 0 || ftruncate(fd, pages * page))
			die("memfd");
	}
	mem = map(flags, fd);
	if (op == CONTINUE) {
		second = map(MAP_SHARED, fd);
		fill(second);
	} else if (strcmp(what, "copy") && op == COPY) {
		second = map(flags, -1);
	}
	if (!strcmp(what, "memcpy") || !strcmp(what, "touch")) {
		plain(!strcmp(what, "memcpy"));
		return 0;
	}
	open_uffd(mode);
	if (!strcmp(what, "move")) {
		op = MOVE;
		pthread_t t;
		pthread_create(&t, 0, mover, 0);
	} else {
		hand(uffd, (struct hello){ (uintptr_t)mem, pages * page, page, op, getpid() });
	}
	if (!strcmp(what, "bulk"))
		bulk();
	else
		measure();
	fflush(stdout);
	_exit(0);
}
