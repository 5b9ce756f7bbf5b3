package pager

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/source"
)

func testClient(t *testing.T, p *Pager) *Client {
	t.Helper()
	f, err := uffd.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return newClient(p, f)
}

// Whatever has to be tried again is, also if no message comes: the loop reads on
// no longer than until then.
func TestArm(t *testing.T) {
	const soon = time.Hour
	for name, test := range map[string]struct {
		set  func(l *loop)
		want time.Duration
	}{
		"nothing":       {func(*loop) {}, forever},
		"a fault":       {func(l *loop) { l.again, l.retryAt = make([]pending, 1), soon }, soon},
		"a read":        {func(l *loop) { l.done, l.retryAt = make([]*job, 1), soon }, soon},
		"a task":        {func(l *loop) { l.tasks = []*task{{due: soon}} }, soon},
		"a page":        {func(l *loop) { l.troubles[4096] = trouble{waits: true, due: soon} }, soon},
		"nobody's page": {func(l *loop) { l.troubles[4096] = trouble{due: soon} }, forever},
	} {
		c := testClient(t, new(Pager))
		c.loop.armed = unarmed
		test.set(&c.loop)
		c.arm(false)
		if c.loop.armed != test.want {
			t.Errorf("%s: the loop waits until %v, want %v", name, c.loop.armed, test.want)
		}
	}
}

// The descriptor of a child that cannot be served is closed.
func TestForkFails(t *testing.T) {
	reports := 0
	c := testClient(t, &Pager{ErrorHook: func(*Client, error) { reports++ }})
	fd, err := unix.Open(os.DevNull, unix.O_PATH|unix.O_CLOEXEC, 0) // cannot be made non-blocking
	if err != nil {
		t.Fatal(err)
	}
	var number [8]byte
	binary.NativeEndian.PutUint32(number[:], uint32(fd))
	m := event(uffd.EventFork, binary.NativeEndian.Uint64(number[:]))
	c.batch([]uffd.Msg{m})
	if reports != 1 {
		t.Errorf("%d reports, want 1", reports)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("the descriptor is open: %v", err)
	}
}

// What is being read for memory that a move covers is not installed there.
func TestRemapOutdatesTarget(t *testing.T) {
	c := testClient(t, new(Pager))
	from := uffd.Range{Start: 1 << 20, Len: uint64(systemPage)}
	to := uffd.Range{Start: 2 << 20, Len: uint64(systemPage)}
	for _, r := range []uffd.Range{from, to} {
		if err := c.addRegion(Region{Range: r, Source: source.Zero(1 << 30)}); err != nil {
			t.Fatal(err)
		}
	}
	j := &job{Range: to, pageSize: uint64(systemPage)}
	c.loop.jobs = append(c.loop.jobs, j)
	m := event(uffd.EventRemap, uint64(from.Start), uint64(to.Start), from.Len)
	c.event(&m)
	if !j.outdated {
		t.Error("the read is still good")
	}
}

// stubborn is a source that is read for a while, whatever the context says.
type stubborn struct {
	began, end chan struct{}
	over       *atomic.Bool
}

func (stubborn) Size() int64 { return 1 << 30 }

func (s stubborn) ReadAt(_ context.Context, p []byte, _ int64) (int, error) {
	close(s.began)
	<-s.end
	s.over.Store(true)
	return len(p), nil
}

// When Close returns, nobody uses a source any more, also for a child that is gone.
func TestCloseWaitsForSources(t *testing.T) {
	c := testClient(t, new(Pager))
	child := testClient(t, c.pager)
	child.family = c.family
	child.loop.ctx = t.Context()
	c.family.members = append(c.family.members, child)
	s := stubborn{make(chan struct{}), make(chan struct{}), new(atomic.Bool)}
	page := uffd.Range{Start: 1 << 20, Len: uint64(systemPage)}
	if err := child.addRegion(Region{Range: page, Source: s}); err != nil {
		t.Fatal(err)
	}
	child.submit(&job{Range: page}, child.loop.regions[0])
	<-s.began
	c.family.mu.Lock()
	c.family.leave(child)
	c.family.mu.Unlock()
	time.AfterFunc(50*time.Millisecond, func() { close(s.end) })
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if !s.over.Load() {
		t.Error("the source is still being read")
	}
}

// Buffers for huge pages are not kept.
func TestBuffers(t *testing.T) {
	c := testClient(t, new(Pager))
	for _, size := range []int{4096, maxBuffer, maxBuffer + 1} {
		c.queue.buffers = nil
		c.release(&job{buf: make([]byte, 0, size)}, nil)
		if kept := len(c.queue.buffers) == 1; kept != (size <= maxBuffer) {
			t.Errorf("a buffer of %d bytes kept: %v", size, kept)
		}
	}
}

// A File is as it was when its client is closed: reading waits.
func TestCloseResetsDeadline(t *testing.T) {
	c := testClient(t, new(Pager))
	c.poke()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(20*time.Millisecond, func() { c.file.Close() })
	if _, err := c.file.ReadMsg(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("reading = %v, want an error when the File is closed", err)
	}
}
