package lazymem_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/lazymem"
	"github.com/go-uffd/uffd/source"
)

// manual is a source whose reads a test answers.
type manual struct {
	source.Source
	reads chan *manualRead
}

type manualRead struct {
	first, pages int
	answer       chan error
}

func newManual(data []byte) *manual { return &manual{counted(data), make(chan *manualRead)} }

func (s *manual) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	r := &manualRead{int(off) / pageSize, (len(p) + pageSize - 1) / pageSize, make(chan error)}
	select {
	case s.reads <- r:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	select {
	case err := <-r.answer:
		if err != nil {
			return 0, err
		}
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	return s.Source.ReadAt(ctx, p, off)
}

// next returns the next read, which has to be of the given pages.
func (s *manual) next(t *testing.T, first, pages int) *manualRead {
	t.Helper()
	select {
	case r := <-s.reads:
		if r.first != first || r.pages != pages {
			t.Errorf("%d pages from %d on are read, want %d from %d on", r.pages, r.first, pages, first)
		}
		return r
	case <-time.After(uffdtest.Patience):
		t.Fatalf("nothing is read, want %d pages from %d on", pages, first)
		return nil
	}
}

// touch reads a byte of a page in a goroutine of its own.
func touch(m *lazymem.Memory, page int) <-chan error {
	done := make(chan error, 1)
	go func() {
		_, err := m.ReadAt(make([]byte, 1), int64(page*pageSize))
		done <- err
	}()
	return done
}

func await(t *testing.T, done <-chan error, want error) {
	t.Helper()
	select {
	case err := <-done:
		if !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	case <-time.After(uffdtest.Patience):
		t.Fatalf("hangs, want %v", want)
	}
}

// settle gives goroutines the time to get to where they wait. Too little of it
// makes the test easier, and never fails it.
func settle() { time.Sleep(20 * time.Millisecond) }

// Who waits for another's read gives up on its own, and gets the error only if it
// is about its own page.
func TestWaiting(t *testing.T) {
	src := newManual(pattern(8 * pageSize))
	m := open(t, src, &lazymem.Config{Window: 8 * pageSize})
	failure := errors.New("disk on fire")

	reader := touch(m, 2)
	all := src.next(t, 0, 8)
	ctx, cancel := context.WithCancel(t.Context())
	canceled := make(chan error, 1)
	go func() { canceled <- m.Populate(ctx, 0, 1, nil) }()
	settle()
	cancel()
	await(t, canceled, context.Canceled)

	same, other := touch(m, 2), touch(m, 3)
	settle()
	all.answer <- failure
	src.next(t, 2, 1).answer <- failure // alone
	await(t, reader, failure)
	await(t, same, failure)
	src.next(t, 0, 8).answer <- nil
	await(t, other, nil)

	// The error is forgotten.
	if err := m.Discard(0, m.Size()); err != nil {
		t.Fatal(err)
	}
	reader = touch(m, 2)
	all = src.next(t, 0, 8)
	same = touch(m, 2)
	settle()
	all.answer <- nil
	await(t, reader, nil)
	await(t, same, nil)
}

// No page is read that is there or on its way.
func TestNoPageTwice(t *testing.T) {
	const window = 12
	chunk := max(window, 1<<20/pageSize)
	if chunk%window == 0 { // so that a chunk ends within a window
		t.Fatalf("%d pages of %d are whole windows", chunk, pageSize)
	}
	pages := 2*chunk + window
	data := pattern(pages * pageSize)
	src := newManual(data)
	m := open(t, src, &lazymem.Config{Window: window * pageSize})

	early := touch(m, window+3) // the window behind what is populated first
	middle := src.next(t, window, window)
	populated := make(chan error, 1)
	go func() { populated <- m.Populate(t.Context(), 0, m.Size(), nil) }()
	src.next(t, 0, window).answer <- nil
	settle()
	middle.answer <- nil
	await(t, early, nil)
	long := src.next(t, 2*window, chunk)
	end := 2*window + chunk
	late := touch(m, end) // in the window that the long read ends in
	next := end/window*window + window
	src.next(t, end, next-end).answer <- nil
	await(t, late, nil)
	long.answer <- nil
	src.next(t, next, pages-next).answer <- nil
	await(t, populated, nil)

	// A page in the midst that is there divides a window.
	for _, r := range [][2]int{{0, 5}, {6, window}} {
		if err := m.Discard(int64(r[0]*pageSize), int64((r[1]-r[0])*pageSize)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := m.Bytes(); !errors.Is(err, lazymem.ErrIncomplete) {
		t.Errorf("Bytes = %v", err)
	}
	low := touch(m, 1)
	src.next(t, 0, 5).answer <- nil
	await(t, low, nil)
	high := touch(m, 9)
	src.next(t, 6, window-6).answer <- nil
	await(t, high, nil)
	mem, err := m.Bytes()
	if err != nil || !bytes.Equal(mem, data) {
		t.Errorf("wrong contents, or %v", err)
	}
	if got := fmt.Sprint(m.Resident()); got != fmt.Sprintf("[{0 %d}]", len(data)) {
		t.Errorf("resident: %s", got)
	}
}
