package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/pager"
)

// word is what the memory that migrates holds at offset 8·i.
func word(i uint64) uint64 {
	i += 0x9e3779b97f4a7c15
	i = (i ^ i>>30) * 0xbf58476d1ce4e5b9
	i = (i ^ i>>27) * 0x94d049bb133111eb
	return i ^ i>>31
}

// A process checks its memory itself: at a[0], a[1] bytes, of which a[2] words
// chosen at random with the seed a[3], or all if a[2] is 0. It returns how many
// are wrong. In all of these, a[4] is the offset of the first.
var _ = uffdtest.Handle("check words", func(a []uint64) ([]uint64, error) {
	memory := uffdtest.BytesAt(a[0], a[1])
	words := a[1] / 8
	var wrong uint64
	check := func(i uint64) {
		if binary.NativeEndian.Uint64(memory[8*i:]) != word(a[4]/8+i) {
			wrong++
		}
	}
	r := rand.New(rand.NewPCG(a[3], 0))
	for range a[2] {
		check(r.Uint64N(words))
	}
	if a[2] == 0 {
		for i := range words {
			check(i)
		}
	}
	return []uint64{wrong}, nil
})

// A conn does something to what is written, or to the connection, behind a number
// of bytes.
type conn struct {
	net.Conn
	after int64
	do    func(p []byte, at int64)
	sent  atomic.Int64
}

func (c *conn) Write(p []byte) (int, error) {
	before := c.sent.Load()
	if c.do != nil && before <= c.after && c.after < before+int64(len(p)) {
		p = bytes.Clone(p)
		c.do(p, c.after-before)
	}
	n, err := c.Conn.Write(p)
	c.sent.Add(int64(n))
	return n, err
}

// A move is a process of which memory migrates: it has come from keeper.
type move struct {
	*uffdtest.Process
	memory  uffdtest.Memory
	arrival *arrival
	kept    chan error // what the keeper returns
}

// begin lets a process take over memory of so many pages. The source writes
// through wrap, if that is not nil.
func begin(t testing.TB, pages int, wrap func(net.Conn) net.Conn) *move {
	t.Helper()
	size := pages * os.Getpagesize()
	memory := make([]byte, size)
	for i := range size / 8 {
		binary.NativeEndian.PutUint64(memory[8*i:], word(uint64(i)))
	}
	l := listen(t)
	m := &move{Process: uffdtest.Start(t), kept: make(chan error, 1)}
	go func() {
		k := &keeper{hello: hello{pageSize: os.Getpagesize(), memory: int64(size)}, memory: memory}
		var err error
		if k.conn, err = net.Dial("tcp", l.Addr().String()); err != nil {
			m.kept <- err
			return
		}
		if wrap != nil {
			k.conn = wrap(k.conn)
		}
		m.kept <- k.serve()
	}()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if m.arrival, err = accept(c, int64(size)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.arrival.close)
	m.memory = m.Map(uffdtest.Anon, pages)
	file := m.Open(&uffd.Config{Prefer: pager.Events})
	if _, err := file.Register(m.memory.Range, uffd.RegisterMissing); err != nil {
		t.Fatal(err)
	}
	peer, err := pager.OpenPid(m.Pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close() })
	if err := m.arrival.takeOver(patient(t), file, m.memory.Range, peer); err != nil {
		t.Fatal(err)
	}
	return m
}

// wander reads words at random.
func (m *move) wander(words int, seed uint64) *uffdtest.Call {
	return m.Run("check words", uint64(m.memory.Start), m.memory.Len, uint64(words), seed)
}

func (m *move) checkPage(i int) *uffdtest.Call {
	page := m.memory.Page(i)
	return m.Run("check words", uint64(page.Start), page.Len, 0, 0, uint64(page.Start-m.memory.Start))
}

func (m *move) intact(t testing.TB) {
	t.Helper()
	if wrong := m.Run("check words", uint64(m.memory.Start), m.memory.Len).Value(); wrong != 0 {
		t.Errorf("%d words are wrong", wrong)
	}
}

func requirePidfd(t testing.TB) {
	t.Helper()
	uffdtest.RequireKernel(t, 5, 3, "pidfd_open")
}

// TestEveryByte has a process read at random while its memory comes.
func TestEveryByte(t *testing.T) {
	requirePidfd(t)
	const pages, threads = 4096, 6
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	m := begin(t, pages, nil)
	var wandering []*uffdtest.Call
	for i := range threads {
		wandering = append(wandering, m.wander(2000, seed+uint64(i)))
	}
	n, err := m.arrival.complete(patient(t), nil)
	if n != pages || err != nil {
		t.Errorf("%d of %d pages were compared: %v", n, pages, err)
	}
	if err := <-m.kept; err != nil {
		t.Errorf("the source: %v", err)
	}
	for _, w := range wandering {
		if wrong := w.Value(); wrong != 0 {
			t.Errorf("%d words were wrong on the way", wrong)
		}
	}
	m.intact(t)
	s := m.arrival.client.Stats()
	if s.Demand == 0 || s.Populated == 0 || s.Copied != pages || s.Zeroed+s.Poisoned+s.Held+s.Unknown != 0 {
		t.Errorf("%+v", s)
	}
	t.Logf("%d pages on demand, %d around them, %d in the background", s.Demand, s.Around, s.Populated)
}

// TestDiscardWhileMoving has a process discard memory on the way: it must not come
// back.
func TestDiscardWhileMoving(t *testing.T) {
	requirePidfd(t)
	uffdtest.RequireAllFaults(t)
	const pages = 2048
	m := begin(t, pages, nil)
	completed := make(chan error, 1)
	go func() {
		_, err := m.arrival.complete(patient(t), nil)
		completed <- err
	}()
	r := rand.New(rand.NewPCG(rand.Uint64(), 0))
	discarded := make(map[int]bool)
	for range 100 {
		i := r.IntN(pages)
		discarded[i] = true
		m.Madvise(m.memory.Page(i), unix.MADV_DONTNEED).Value()
	}
	if err := <-completed; err != nil {
		t.Fatal(err)
	}
	for i := range pages {
		if discarded[i] {
			if n := m.Check(m.memory.Page(i), 0).Value(); n != 0 {
				t.Fatalf("page %d has come back", i)
			}
		} else if wrong := m.checkPage(i).Value(); wrong != 0 {
			t.Fatalf("page %d has %d wrong words", i, wrong)
		}
	}
}

// TestConnectionIsLost cuts the connection somewhere. What has come is right,
// and who touches the rest waits.
func TestConnectionIsLost(t *testing.T) {
	requirePidfd(t)
	const pages = 1024
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for range 5 {
		cut := 1<<20 + r.Int64N(int64(pages*os.Getpagesize())-1<<20) // after the first replies
		m := begin(t, pages, func(c net.Conn) net.Conn {
			return &conn{Conn: c, after: cut, do: func([]byte, int64) { c.Close() }}
		})
		wandering := []*uffdtest.Call{m.wander(1000, seed), m.wander(1000, seed+1)}
		_, err := m.arrival.complete(patient(t), nil)
		if err == nil || !strings.Contains(err.Error(), "the connection to the source is lost") {
			t.Fatalf("cut after %d bytes: %v", cut, err)
		}
		if err := <-m.kept; err == nil || errors.Is(err, errNotTaken) {
			t.Errorf("the source, cut after %d bytes: %v", cut, err)
		}
		present := 0
		var missing []*uffdtest.Call
		for i := range pages {
			if m.Pagemap(m.memory.Page(i).Start)&uffdtest.PagemapPresent == 0 {
				if len(missing) < 4 {
					missing = append(missing, m.checkPage(i))
				}
				continue
			}
			present++
			if wrong := m.checkPage(i).Value(); wrong != 0 {
				t.Fatalf("cut after %d bytes: page %d has %d wrong words", cut, i, wrong)
			}
		}
		if present == 0 || len(missing) == 0 {
			t.Errorf("cut after %d bytes: %d of %d pages are there", cut, present, pages)
		}
		time.Sleep(20 * time.Millisecond) // in which a wrong answer might come
		m.Kill()
		for _, call := range append(missing, wandering...) {
			if v, err := call.Result(); err == nil && (v[0] != 0 || len(missing) > 0 && call == missing[0]) {
				t.Errorf("cut after %d bytes: a thread that touches what is missing goes on, and sees %d wrong words", cut, v[0])
			}
		}
		if s := m.arrival.client.Stats(); s.Zeroed+s.Poisoned != 0 || s.Held == 0 {
			t.Errorf("%+v", s)
		}
	}
}

// TestBadSources has sources that send nonsense. None of it gets into memory.
func TestBadSources(t *testing.T) {
	requirePidfd(t)
	const pages = 256
	for _, test := range []struct {
		name, want string
		after      int64
		do         func(p []byte, at int64)
	}{
		{"damage", "damaged on the way", 300_000, func(p []byte, at int64) { p[at] ^= 1 }},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := begin(t, pages, func(c net.Conn) net.Conn { return &conn{Conn: c, after: test.after, do: test.do} })
			if _, err := m.arrival.complete(patient(t), nil); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v", err)
			}
			<-m.kept
			for i := range pages {
				if m.Pagemap(m.memory.Page(i).Start)&uffdtest.PagemapPresent != 0 {
					if wrong := m.checkPage(i).Value(); wrong != 0 {
						t.Fatalf("page %d has %d wrong words", i, wrong)
					}
				}
			}
		})
	}
}

// TestEndsEarly has the process end before all its memory has come.
func TestEndsEarly(t *testing.T) {
	requirePidfd(t)
	var once sync.Once
	var m *move
	began := make(chan bool)
	m = begin(t, 1024, func(c net.Conn) net.Conn {
		return &conn{Conn: c, after: 1 << 20, do: func([]byte, int64) { once.Do(func() { <-began; m.Kill() }) }}
	})
	close(began)
	if n, err := m.arrival.complete(patient(t), nil); !errors.Is(err, errEnded) {
		t.Errorf("%d pages, %v", n, err)
	}
	if err := <-m.kept; err != nil {
		t.Errorf("the source: %v", err)
	}
}

// TestWrongSums has a source whose memory changes.
func TestWrongSums(t *testing.T) {
	size := os.Getpagesize()
	k := &keeper{hello: hello{pageSize: size, memory: int64(4 * size)}, memory: make([]byte, 4*size)}
	r := meet(t, k)
	for off := range int64(4) {
		if _, err := r.ReadAt(patient(t), make([]byte, size), off*int64(size)); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := r.verify(patient(t)); n != 4 || err != nil {
		t.Fatalf("%d pages are right, %v", n, err)
	}
	k.memory[3*size-1] = 1
	if n, err := r.verify(patient(t)); n != 2 || err == nil || !strings.Contains(err.Error(), "not that of the source") {
		t.Errorf("%d pages are right, %v", n, err)
	}
}

// meet connects a remote to a keeper.
func meet(t testing.TB, k *keeper) *remote {
	t.Helper()
	here, there := net.Pipe()
	k.conn = there
	kept := make(chan error, 1)
	go func() { kept <- k.serve() }()
	h, err := readHello(here, k.hello.pageSize, k.hello.memory)
	if err != nil {
		t.Fatal(err)
	}
	r := newRemote(here, h)
	t.Cleanup(func() { r.close(); <-kept })
	if err := r.ask(patient(t), request{kind: ready}, nil); err != nil {
		t.Fatal(err)
	}
	return r
}

// TestBadDestinations has peers that ask for nonsense.
func TestBadDestinations(t *testing.T) {
	size := uint32(os.Getpagesize())
	page := request{kind: read, length: 256 * size}
	for _, test := range []struct {
		name, want string
		ask        func(conn net.Conn)
	}{
		{"leaves", "EOF", func(conn net.Conn) { conn.Close() }},
		{"leaves in a request", "EOF", func(conn net.Conn) { conn.Write([]byte{1}); conn.Close() }},
		{"asks for what is not there", "outside", func(conn net.Conn) { request{kind: read, offset: 1 << 40, length: size}.write(conn) }},
		{"is ready twice", "second time", func(conn net.Conn) { request{kind: ready}.write(conn) }},
		{"asks without end", "more than 1024", func(conn net.Conn) {
			for page.write(conn) == nil { // and reads nothing
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := listen(t)
			go func() {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
				h, err := readHello(conn, int(size), 1<<30)
				if err != nil {
					return
				}
				request{kind: ready}.write(conn)
				readReply(conn, nil, func(uint32) (int, bool) { return 0, true })
				test.ask(conn)
				for h != nil { // until the source hangs up
					if _, err := conn.Read(make([]byte, 1)); err != nil {
						return
					}
				}
			}()
			k := &keeper{hello: hello{pageSize: int(size), memory: int64(256 * size)}, memory: make([]byte, 256*size)}
			var err error
			if k.conn, err = net.Dial("tcp", l.Addr().String()); err != nil {
				t.Fatal(err)
			}
			err = k.serve()
			if err == nil || errors.Is(err, errNotTaken) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want an error with %q", err, test.want)
			}
		})
	}
}

// TestContextEnds gives up a read, whose reply comes later.
func TestContextEnds(t *testing.T) {
	here, there := net.Pipe()
	defer there.Close()
	h := &hello{pageSize: 4096, memory: 1 << 20}
	r := newRemote(here, h)
	defer r.close()
	first := make(chan request, 1)
	go func() {
		q, _ := readRequest(there, h)
		first <- q
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	page := make([]byte, 4096)
	if n, err := r.ReadAt(ctx, page, 0); n != 0 || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("read %d bytes, %v", n, err)
	}
	go func() {
		late := bytes.Repeat([]byte{1}, 4096)
		there.Write(append(replyHeader((<-first).id, late), late...))
		q, _ := readRequest(there, h)
		right := bytes.Repeat([]byte{2}, 4096)
		there.Write(append(replyHeader(q.id, right), right...))
	}()
	next := make([]byte, 4096)
	if _, err := r.ReadAt(patient(t), next, 4096); err != nil || next[0] != 2 {
		t.Errorf("the next read has %d, %v", next[0], err)
	}
	if page[0] != 0 {
		t.Error("the late reply was written to memory that was given back")
	}
}
