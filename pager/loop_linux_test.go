package pager

import (
	"encoding/binary"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
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
	fd, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0) // no userfaultfd
	if err != nil {
		t.Fatal(err)
	}
	var number [8]byte
	binary.NativeEndian.PutUint32(number[:], uint32(fd))
	m := event(uffd.EventFork, binary.NativeEndian.Uint64(number[:]))
	c.event(&m)
	if reports != 1 {
		t.Errorf("%d reports, want 1", reports)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("the descriptor is open: %v", err)
	}
}
