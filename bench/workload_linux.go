package main

import "fmt"

// A workload is something to measure, and who serves it: the first is what the
// others are compared with.
type workload struct {
	name, title string
	client      []string // arguments
	clientCPUs  cpus
	handlerCPUs cpus
	hugePages   int
	turns       int
	servers     []server
	bandwidth   bool   // it is about bytes, not faults
	countsPages bool   // samples count pages
	tracking    bool   // it is about tracking
	snapshot    bool   // and that about snapshots
	sparse      bool   // there is time between faults: their number says nothing
	short       string // name in the plot, if it is there
}

// A server is a way to serve.
type server struct {
	name    string
	handler []string // command; nil: the client serves itself
	client  []string // command, if not that of the workload
	burners int      // processes that compute meanwhile
	bulk    bool     // the handler measures
	tracks  bool     // the handler measures, and prints what the client does
	records bool     // the handler writes a record when the client is gone
}

func cServer(name string, args ...string) server {
	return server{name: name, handler: append([]string{"handler", "image=IMAGE"}, args...)}
}

func goServer(name string, args ...string) server {
	return server{name: name, handler: append([]string{"go", "handler", "image=IMAGE"}, args...)}
}

func recording(s server) server {
	s.records = true
	return s
}

var (
	plainC     = cServer("C")
	bareLoop   = goServer("uffd", "loop=root")
	plainPager = goServer("pager", "loop=pager")
	three      = []server{plainC, bareLoop, plainPager}

	one  = cpus{0} // so that client and handler take turns
	each = cpus{1}
)

// workloads are those of the table, in its order.
func workloads(quick bool) []*workload {
	faults := func(pages int) []string {
		if quick {
			pages = min(pages, 512)
		}
		return []string{fmt.Sprint("pages=", pages)}
	}
	many := faults(16384)
	huge := imageSize >> 21
	if quick {
		huge = 4
	}

	all := []*workload{
		{name: "copy", short: "copy", title: "Copy", client: many, clientCPUs: one, handlerCPUs: one, turns: 25, servers: []server{
			plainC, bareLoop, plainPager,
			cServer("C, 16 messages", "loop=batch"),
			goServer("pager, workers", "loop=workers"),
		}},
		{name: "copy-100us", short: "100 µs\napart", title: "Copy, 100 µs apart", client: with(faults(2048), "gap=100000"),
			clientCPUs: one, handlerCPUs: one, turns: 25, servers: three, sparse: true},
		{name: "copy-1ms", short: "1 ms\napart", title: "Copy, 1 ms apart", client: with(faults(256), "gap=1000000"),
			clientCPUs: one, handlerCPUs: one, turns: 15, servers: three, sparse: true},
		{name: "copy-100us-asleep", title: "Copy, 100 µs apart, asleep between", client: with(faults(2048), "gap=100000", "sleep=1"),
			clientCPUs: one, handlerCPUs: one, turns: 15, servers: three, sparse: true},
		{name: "zeropage", short: "zero\npage", title: "ZeroPage", client: with(many, "op=zeropage"), clientCPUs: one, handlerCPUs: one, turns: 15, servers: three},
		{name: "continue", short: "shmem\ncontinue", title: "Continue, shmem", client: with(many, "op=continue"), clientCPUs: one, handlerCPUs: one, turns: 15, servers: three},
		{name: "wp", short: "write\nprotect", title: "WriteProtect", client: with(many, "op=wp"), clientCPUs: one, handlerCPUs: one, turns: 15, servers: three},
		{name: "hugetlb", short: "2 MiB\nhugetlb", title: "Copy, 2 MiB hugetlb", client: with([]string{"huge=1"}, fmt.Sprint("pages=", huge)), hugePages: huge,
			clientCPUs: one, handlerCPUs: one, turns: 15, servers: three},
		{name: "move", short: "move", title: "Move, in the process itself", clientCPUs: one, handlerCPUs: one, turns: 15, servers: []server{
			{name: "C", client: with([]string{"client", "op=move"}, many...)},
			{name: "uffd", client: with([]string{"go", "mover"}, many...)},
		}},
		{name: "free", short: "not\npinned", title: "Copy, not pinned", client: many, turns: 25, servers: with(three, cServer("C, spinning", "loop=spin"))},
		{name: "free-100us", title: "Copy, not pinned, 100 µs apart", client: with(faults(2048), "gap=100000"), turns: 15,
			servers: with(three, cServer("C, spinning", "loop=spin")), sparse: true},
		{name: "apart", title: "Copy, a core for each", client: many, clientCPUs: one, handlerCPUs: each, turns: 9,
			servers: with(three, cServer("C, spinning", "loop=spin"))},
		{name: "threads-2", short: "2\nthreads", title: "Copy, 2 threads", client: with(many, "threads=2"), turns: 15, servers: three},
		{name: "threads-8", short: "8\nthreads", title: "Copy, 8 threads", client: with(many, "threads=8"), turns: 15, servers: three},
		{name: "replay", title: "Copy, in leaps, not pinned", client: with(many, "all=1", "scatter=1"), turns: 9, servers: []server{
			plainC,
			plainPager,
			recording(goServer("pager, recording", "loop=pager", "record=DIR/record")),
			goServer("pager, replaying that", "loop=pager", "replay=DIR/record"),
		}},
		{name: "busy", title: "Copy, beside 4 busy threads", client: with(faults(2048), "gap=20000", "rr=1"), turns: 7, sparse: true,
			servers: []server{
				{name: "C", handler: plainC.handler, burners: 4},
				{name: "C, nice -10", handler: with(plainC.handler, "nice=-10"), burners: 4},
				goServer("uffd", "loop=root", "burn=4"),
				goServer("pager", "loop=pager", "burn=4"),
				goServer("pager, own process, nice -10", "loop=process", "burn=4", "nice=-10"),
			}},
	}
	for _, pages := range []int{1, 4, 16, 64} {
		all = append(all, &workload{
			name: fmt.Sprintf("around-%d", pages), title: fmt.Sprintf("read in sequence, %d KiB a fault", 4*pages), bandwidth: true, countsPages: true,
			client: with(many, "all=1"), clientCPUs: one, handlerCPUs: one, turns: 9, servers: []server{
				cServer("C", fmt.Sprint("around=", pages)),
				goServer("uffd", "loop=root", fmt.Sprint("around=", pages)),
				goServer("pager", "loop=pager", fmt.Sprint("around=", pages)),
			}})
	}
	size := with(many, "rounds=4")
	bulk := func(s server, chunk int) server {
		s.bulk = true
		s.handler = with(s.handler, fmt.Sprint("bulk=", chunk), "rounds=4")
		return s
	}
	for _, kib := range []int{4, 64, 2048} {
		w := &workload{name: fmt.Sprintf("bulk-%d", kib), title: fmt.Sprintf("fill, %d KiB at a time", kib), bandwidth: true,
			client: with(size, "op=bulk"), clientCPUs: one, handlerCPUs: one, turns: 25,
			servers: []server{bulk(plainC, kib<<10), bulk(bareLoop, kib<<10)}}
		switch kib {
		case 64:
			w.servers = append(w.servers, server{name: "memcpy to new memory", client: with([]string{"client", "op=touch"}, size...)},
				server{name: "memcpy", client: with([]string{"client", "op=memcpy"}, size...)})
		case 2048:
			w.servers = append(w.servers, bulk(plainPager, kib<<10))
		}
		all = append(all, w)
	}
	return all
}

func with[T any](list []T, more ...T) []T { return append(list[:len(list):len(list)], more...) }
