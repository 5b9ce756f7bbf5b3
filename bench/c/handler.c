// A process that handles the faults of the client, in a loop as plain as can be.
// Arguments:
//
//	loop=plain   waits in read for one message at a time
//	loop=batch   waits in read for up to 16
//	loop=spin    reads again and again without waiting
//	image=FILE   what to copy
//	around=N     pages to install for a fault
//	bulk=BYTES   no faults: fills the memory in chunks, over and over
//	rounds=N     how often; it prints the bytes and the nanoseconds
//	burn=1       no faults: computes for ever
//	nice=N       the priority of the process
#include "common.h"
#include <sys/resource.h>

static struct hello hello;
static int uffd;
static char *image;

static int install(uint64_t at, uint64_t length)
{
	struct uffdio_range range = { at, length };
	switch (hello.op) {
	case COPY: {
		struct uffdio_copy copy = { at, (uintptr_t)image + (at - hello.start), length, 0, 0 };
		return ioctl(uffd, UFFDIO_COPY, &copy);
	}
	case ZEROPAGE: {
		struct uffdio_zeropage zero = { range, 0, 0 };
		return ioctl(uffd, UFFDIO_ZEROPAGE, &zero);
	}
	case CONTINUE: {
		struct uffdio_continue cont = { range, 0, 0 };
		return ioctl(uffd, UFFDIO_CONTINUE, &cont);
	}
	default: {
		struct uffdio_writeprotect wp = { range, 0 };
		return ioctl(uffd, UFFDIO_WRITEPROTECT, &wp);
	}
	}
}

static void serve(int batch, int spin, uint64_t around)
{
	struct uffd_msg msgs[16];
	uint64_t window = around * hello.page;
	if (spin)
		fcntl(uffd, F_SETFL, O_NONBLOCK);
	for (;;) {
		ssize_t n = read(uffd, msgs, batch * sizeof *msgs);
		if (n < 0 && errno == EAGAIN)
			continue;
		if (n <= 0)
			die("read");
		for (unsigned i = 0; i < n / sizeof *msgs; i++) {
			if (msgs[i].event != UFFD_EVENT_PAGEFAULT)
				continue;
			uint64_t off = (msgs[i].arg.pagefault.address - hello.start) / window * window;
			uint64_t length = window < hello.length - off ? window : hello.length - off;
			struct uffdio_range range = { hello.start + off, length };
			if (install(range.start, range.len) && ioctl(uffd, UFFDIO_WAKE, &range))
				die("UFFDIO_WAKE");
		}
	}
}

static void bulk(uint64_t chunk, uint64_t rounds)
{
	uint64_t total = 0;
	char c;
	for (uint64_t r = 1; r <= rounds; r++) {
		if (write(SOCKET, r < rounds ? "d" : "e", 1) != 1 || read(SOCKET, &c, 1) != 1)
			die("discarding");
		uint64_t begin = now();
		for (uint64_t off = 0; off < hello.length; off += chunk)
			if (install(hello.start + off, chunk))
				die("UFFDIO_COPY");
		total += now() - begin;
	}
	printf("%lu %lu\n", hello.length * rounds, total);
	fflush(stdout);
	if (write(SOCKET, "e", 1) != 1)
		die("write");
}

int main(int argc, char **argv)
{
	(void)argc;
	if (number(argv, "burn", 0))
		for (volatile uint64_t i = 0;; i++)
			;
	const char *loop = option(argv, "loop", "plain");
	if (setpriority(PRIO_PROCESS, 0, strtol(option(argv, "nice", "0"), 0, 0)))
		die("setpriority");
	uffd = receive(&hello);
	int fd = open(option(argv, "image", "/dev/null"), O_RDONLY | O_CLOEXEC);
	image = mmap(0, hello.length, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
	if (image == MAP_FAILED && hello.op == COPY)
		die("image");
	if (write(SOCKET, "r", 1) != 1)
		die("write");
	uint64_t chunk = number(argv, "bulk", 0);
	if (chunk)
		bulk(chunk, number(argv, "rounds", 1));
	else
		serve(!strcmp(loop, "batch") ? 16 : 1, !strcmp(loop, "spin"), number(argv, "around", 1));
	return 0;
}
