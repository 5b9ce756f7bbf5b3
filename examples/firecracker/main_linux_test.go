package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/handoff"
	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/pager"
)

func TestMain(m *testing.M) {
	uffdtest.Main(m, uffdtest.Role{Name: "handler", Run: func() error {
		return run(strings.Split(os.Getenv("FIRECRACKER_ARGS"), "\n"), os.Stdout)
	}})
}

// The versions of Firecracker that a test process can be.
const (
	version1_1  = iota // closes the connection at once
	version1_7         // page_size_kib
	version1_12        // page_size; keeps the connection
	development        // more fields and descriptors
	versions
)

// oldest is the oldest version that can be. 1.1 does not say what size pages have:
// it is 4096 bytes.
func oldest() int {
	if os.Getpagesize() != 4096 {
		return version1_7
	}
	return version1_1
}

// vmm is what a process that acts as Firecracker keeps open.
var vmm struct {
	file   *uffd.File
	socket int
}

// Loading a snapshot is what Firecracker does on PUT /snapshot/load: register two
// regions and send one message. It does not use package handoff.
var _ = uffdtest.Handle("load snapshot", func(a []uint64) ([]uint64, error) {
	version, pageSize := a[4], a[5]
	f, err := uffd.New(&uffd.Config{Require: uffd.FeatureEventRemove})
	if err != nil {
		return nil, err
	}
	var regions []map[string]any
	offset := uint64(0)
	for _, r := range []uffd.Range{{Start: uffd.Addr(a[0]), Len: a[1]}, {Start: uffd.Addr(a[2]), Len: a[3]}} {
		if _, err := f.Register(r, uffd.RegisterMissing); err != nil {
			return nil, err
		}
		region := map[string]any{"base_host_virt_addr": r.Start, "size": r.Len, "offset": offset}
		switch version {
		case version1_7:
			region["page_size_kib"] = pageSize
		case version1_12:
			region["page_size"], region["page_size_kib"] = pageSize, pageSize
		case development:
			region["page_size"], region["gpa_start"], region["is_guest_memfd"] = pageSize, offset, false
		}
		offset += r.Len
		regions = append(regions, region)
	}
	message, err := json.Marshal(regions)
	if err != nil {
		return nil, err
	}
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(socket, &unix.SockaddrUnix{Name: os.Getenv("FIRECRACKER_SOCKET")}); err != nil {
		return nil, err
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var sendErr error
	err = conn.Control(func(fd uintptr) {
		fds := []int{int(fd)}
		if version == development {
			memfd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
			if err != nil {
				sendErr = err
				return
			}
			fds = append(fds, memfd, memfd)
		}
		sendErr = unix.Sendmsg(socket, message, unix.UnixRights(fds...), nil, 0)
	})
	if err == nil {
		err = sendErr
	}
	vmm.file, vmm.socket = f, socket
	if version < version1_12 {
		unix.Close(socket)
	}
	return nil, err
})

// content is what page i of the snapshot holds.
func content(i int) byte { return byte(i%251 + 1) }

// snapshot writes a memory file.
func snapshot(t testing.TB, pages, pageSize int) string {
	t.Helper()
	var b []byte
	for i := range pages {
		b = append(b, bytes.Repeat([]byte{content(i)}, pageSize)...)
	}
	name := filepath.Join(t.TempDir(), "mem")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// A testHandler is a handler in this process.
type testHandler struct {
	*handler
	socket string
	log    *buffer
	stop   func() // as SIGTERM does
}

type buffer struct {
	mu sync.Mutex
	bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.String()
}

// socketPath returns a path for a socket, which the processes that are started
// from now on connect to.
func socketPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "fc") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "socket")
	t.(*testing.T).Setenv("FIRECRACKER_SOCKET", path)
	return path
}

// start serves a snapshot until the test is over.
func start(t testing.TB, mem string, diffs ...string) *testHandler {
	t.Helper()
	return startWith(t, func(*handler) {}, mem, diffs...)
}

// startWith is start for a handler that is changed before it serves.
func startWith(t testing.TB, change func(*handler), mem string, diffs ...string) *testHandler {
	t.Helper()
	image, err := openImage(mem, diffs)
	if err != nil {
		t.Fatal(err)
	}
	socket := socketPath(t)
	l, err := listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	b := new(buffer)
	ctx, cancel := context.WithCancel(context.Background())
	h := &testHandler{newHandler(image, log.New(b, "", 0)), socket, b, cancel}
	change(h.handler)
	over := make(chan error, 1)
	go func() { over <- h.serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-over:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(uffdtest.Patience):
			t.Error("the handler does not end")
		}
		if t.Failed() {
			t.Logf("the handler said:\n%s", b)
		}
	})
	return h
}

// eventually waits until ok returns true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(uffdtest.Patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still not: %s", what)
		}
	}
}

// A guest is a process that acts as a Firecracker with a microVM.
type guest struct {
	*uffdtest.Process
	low, high uffdtest.Memory // regions of its memory
}

// restore starts a guest, of which a quarter is the lower region.
func restore(t testing.TB, kind uffdtest.Kind, pages, version int) *guest {
	t.Helper()
	p := uffdtest.Start(t)
	g := &guest{p, p.Map(kind, pages/4), p.Map(kind, pages-pages/4)}
	p.Run("load snapshot", uint64(g.low.Start), g.low.Len, uint64(g.high.Start), g.high.Len,
		uint64(version), uint64(kind.PageSize())).Value()
	return g
}

func (g *guest) pages() int { return g.low.Pages() + g.high.Pages() }

func (g *guest) page(i int) uffd.Range {
	if i < g.low.Pages() {
		return g.low.Page(i)
	}
	return g.high.Page(i - g.low.Pages())
}

// holds checks that page i is full of b.
func (g *guest) holds(t testing.TB, i int, b byte) {
	t.Helper()
	if n := g.Check(g.page(i), b).Value(); n != 0 {
		t.Fatalf("page %d: %d bytes are not %d", i, n, b)
	}
}

// intact checks all pages, except those that differ on purpose.
func (g *guest) intact(t testing.TB, except map[int]byte) {
	t.Helper()
	for i := range g.pages() {
		want, ok := except[i]
		if !ok {
			want = content(i)
		}
		g.holds(t, i, want)
	}
}

func TestVersions(t *testing.T) {
	const pages = 300
	mem := snapshot(t, pages, os.Getpagesize())
	for version := oldest(); version < versions; version++ {
		t.Run([]string{"1.1", "1.7", "1.12", "development"}[version], func(t *testing.T) {
			h := start(t, mem)
			g := restore(t, uffdtest.Anon, pages, version)
			// vCPUs that touch everything at the same time.
			var vcpus []*uffdtest.Call
			for range 4 {
				vcpus = append(vcpus, g.Touch(g.low), g.Touch(g.high))
			}
			for _, vcpu := range vcpus {
				vcpu.Value()
			}
			g.intact(t, nil)
			eventually(t, "all pages are counted", func() bool { return h.pager.Stats().Copied == pages })
			if s := h.pager.Stats(); s.Poisoned+s.Unknown+s.Zeroed != 0 {
				t.Errorf("%+v", s)
			}
			g.Kill()
			eventually(t, "the exit is noticed", func() bool { return h.running.Load() == 0 && h.exited.Load() == 1 })
			eventually(t, "numbers are printed", func() bool { return strings.Contains(h.log.String(), "300 pages copied") })
		})
	}
}

// TestKernelFaults touches memory as KVM does on behalf of a vCPU: from the kernel,
// through get_user_pages.
func TestKernelFaults(t *testing.T) {
	uffdtest.RequireAllFaults(t)
	uffdtest.RequireKernel(t, 5, 14, "MADV_POPULATE_WRITE")
	const pages = 300
	h := start(t, snapshot(t, pages, os.Getpagesize()))
	g := restore(t, uffdtest.Anon, pages, version1_12)
	a, b := g.Populate(g.high.Range, true), g.Populate(g.low.Range, false)
	a.Value()
	b.Value()
	before := h.pager.Stats().Missing
	g.intact(t, nil)
	if after := h.pager.Stats().Missing; before == 0 || after != before {
		t.Errorf("%d faults in the kernel, %d after it", before, after-before)
	}
}

func TestHugePages(t *testing.T) {
	uffdtest.RequireKernel(t, 5, 18, "MADV_DONTNEED and mremap of hugetlb memory")
	uffdtest.LockSettings(t).HugePages(4)
	mem := snapshot(t, 4, uffdtest.HugePageSize())
	start(t, mem)
	g := restore(t, uffdtest.HugetlbPrivate, 4, version1_12)
	g.intact(t, nil)
	g.Madvise(g.page(1), unix.MADV_DONTNEED).Value()
	g.intact(t, map[int]byte{1: 0})
}

func TestDiffs(t *testing.T) {
	const pages = 64
	size := os.Getpagesize()
	mem := snapshot(t, pages, size)
	want := make(map[int]byte)
	var diffs []string
	for n, changed := range [][]int{{3, 4, 5, 20}, {5, 21, 63}} {
		name := filepath.Join(t.TempDir(), "diff")
		f, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range changed {
			want[i] = byte(252 + n)
			if _, err := f.WriteAt(bytes.Repeat([]byte{want[i]}, size), int64(i*size)); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Truncate(int64(pages * size)); err != nil {
			t.Fatal(err)
		}
		f.Close()
		diffs = append(diffs, name)
	}
	start(t, mem, diffs...)
	restore(t, uffdtest.Anon, pages, version1_12).intact(t, want)
}

// TestBalloon discards memory while vCPUs touch it.
func TestBalloon(t *testing.T) {
	const pages = 256
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	h := start(t, snapshot(t, pages, os.Getpagesize()))
	for range 4 {
		g := restore(t, uffdtest.Anon, pages, version1_12)
		want := make(map[int]byte)
		rounds := 30
		if testing.Short() {
			rounds = 5
		}
		for range rounds {
			first := r.IntN(g.high.Pages())
			n := 1 + r.IntN(min(40, g.high.Pages()-first))
			inflated := uffd.Range{Start: g.high.Page(first).Start, Len: uint64(n * os.Getpagesize())}
			around := uffdtest.Memory{Range: inflated, Kind: uffdtest.Anon}
			vcpu := g.Touch(around) // races with the balloon
			g.Madvise(inflated, unix.MADV_DONTNEED).Value()
			vcpu.Value()
			for i := range n {
				want[g.low.Pages()+first+i] = 0
			}
			if n := g.Check(inflated, 0).Value(); n != 0 {
				t.Fatalf("%d bytes came back after %v was discarded", n, inflated)
			}
			if r.IntN(3) == 0 { // the guest uses the memory again
				i := g.low.Pages() + first
				g.Fill(g.page(i), 255).Value()
				want[i] = 255
			}
		}
		g.intact(t, want)
		g.Kill()
	}
	if s := h.pager.Stats(); s.Removes == 0 || s.Poisoned+s.Unknown != 0 {
		t.Errorf("%+v", s)
	}
}

// TestManyVMs serves several at a time, which do not see each other's writes and
// do not mind each other's end.
func TestManyVMs(t *testing.T) {
	const pages, vms = 128, 8
	h := start(t, snapshot(t, pages, os.Getpagesize()))
	var wg sync.WaitGroup
	var guests []*guest
	for i := range vms {
		guests = append(guests, restore(t, uffdtest.Anon, pages, max(i%versions, oldest())))
	}
	eventually(t, "all are served", func() bool { return h.running.Load() == vms })
	for i, g := range guests {
		wg.Go(func() {
			if i%2 == 0 { // in the middle of faults
				g.Touch(g.low)
				g.Touch(g.high)
				g.Kill()
				return
			}
			g.Fill(g.page(i), 255).Value()
			g.Touch(g.low).Value()
		})
	}
	wg.Wait()
	for i, g := range guests {
		if i%2 == 1 {
			g.intact(t, map[int]byte{i: 255})
		}
	}
	eventually(t, "half of them are gone", func() bool { return h.running.Load() == vms/2 && h.exited.Load() == vms/2 })
}

// TestStrangers lets others than Firecracker connect.
func TestStrangers(t *testing.T) {
	const pages = 16
	h := start(t, snapshot(t, pages, os.Getpagesize()))
	dial := func() net.Conn {
		conn, err := net.Dial("unix", h.socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	dial()         // says nothing
	dial().Close() // leaves
	fmt.Fprint(dial(), "GET / HTTP/1.1\r\n\r\n")
	fmt.Fprint(dial(), `[{"base_host_virt_addr":65536,"size":65536,"offset":0}]`) // and no descriptor
	restore(t, uffdtest.Anon, 2*pages, version1_12)                               // is of another snapshot
	eventually(t, "four are refused", func() bool { return h.refused.Load() == 4 })
	restore(t, uffdtest.Anon, pages, version1_12).intact(t, nil)
	for _, want := range []string{"hung up", "not Firecracker's", "no descriptor", "outside of the memory file"} {
		if !strings.Contains(h.log.String(), want) {
			t.Errorf("the log lacks %q", want)
		}
	}
}

// TestTerminateDuringHello ends the handler when a microVM has connected and not
// yet sent its message: nobody else can serve it.
func TestTerminateDuringHello(t *testing.T) {
	const pages = 16
	h := start(t, snapshot(t, pages, os.Getpagesize()))
	dial := func() *net.UnixConn {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: h.socket, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	conn := dial()
	dial().Close()
	eventually(t, "the second connection, and so the first, is accepted", func() bool { return h.refused.Load() == 1 })
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, pages)
	f := p.Open(&uffd.Config{Require: uffd.FeatureEventRemove})
	if _, err := f.Register(mem.Range, uffd.RegisterMissing); err != nil {
		t.Fatal(err)
	}
	h.stop()
	if err := handoff.SendFirecracker(t.Context(), conn, f, []handoff.Region{{Range: mem.Range, PageSize: os.Getpagesize()}}); err != nil {
		t.Fatal(err)
	}
	for i := range pages {
		if n := p.Check(mem.Page(i), content(i)).Value(); n != 0 {
			t.Errorf("page %d: %d bytes are not %d", i, n, content(i))
		}
	}
	p.Kill()
}

// TestTerminate ends a handler process while a microVM runs on.
func TestTerminate(t *testing.T) {
	const pages = 1000
	socket := socketPath(t)
	args := []string{"-socket", socket, "-mem", snapshot(t, pages, os.Getpagesize()), "-metrics", "127.0.0.1:0"}
	cmd := uffdtest.Command("handler", "FIRECRACKER_ARGS="+strings.Join(args, "\n"))
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	lines := bufio.NewScanner(stdout)
	line := func(containing string) string {
		t.Helper()
		for lines.Scan() {
			if strings.Contains(lines.Text(), containing) {
				return lines.Text()
			}
		}
		t.Fatalf("the handler does not say %q", containing)
		return ""
	}
	_, url, _ := strings.Cut(line("metrics on "), "metrics on ")
	line("serving ")
	g := restore(t, uffdtest.Anon, pages, version1_12)
	g.holds(t, 0, content(0))
	g.holds(t, 700, content(700))
	g.Madvise(g.page(900), unix.MADV_DONTNEED).Value()

	// A thread goes on before what it waited for is counted.
	eventually(t, "metrics", func() bool {
		resp, err := http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var numbers struct {
			Running int64
			Pager   pager.Stats
		}
		if err := json.NewDecoder(resp.Body).Decode(&numbers); err != nil {
			t.Fatal(err)
		}
		s := numbers.Pager
		return numbers.Running == 1 && s.Missing >= 2 && s.Demand == 2 && s.Copied < pages && s.Removes == 1
	})

	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	line("999 pages copied")
	io.Copy(io.Discard, stdout)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("the handler: %v", err)
	}
	g.intact(t, map[int]byte{900: 0})
	if _, err := os.Lstat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

func TestListen(t *testing.T) {
	path := socketPath(t)
	l, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if second, err := listen(path); err == nil {
		second.Close()
		t.Error("two listen on one socket")
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	l, err = listen(path)
	if err != nil {
		t.Fatalf("after a handler that was killed: %v", err)
	}
	l.Close()
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := listen(path); err == nil {
		l.Close()
		t.Error("listens in place of a file")
	}
	if b, err := os.ReadFile(path); string(b) != "precious" {
		t.Errorf("the file is gone: %v", err)
	}
}

func TestUsage(t *testing.T) {
	mem := snapshot(t, 1, os.Getpagesize())
	socket := socketPath(t)
	for _, args := range [][]string{
		{},
		{"-mem", mem},
		{"-socket", socket},
		{"-socket", socket, "-mem", mem, "more"},
		{"-socket", socket, "-mem", mem + "x"},
		{"-socket", socket, "-mem", mem, "-diff", mem + "x"},
		{"-socket", socket + "x/y", "-mem", mem},
		{"-socket", socket, "-mem", mem, "-metrics", "nowhere"},
		{"-unknown"},
	} {
		if err := run(args, io.Discard); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
}
