package lazymem_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
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

// awaitWaiting waits until n goroutines wait for reads of others.
func awaitWaiting(t *testing.T, m *lazymem.Memory, n int) {
	t.Helper()
	for deadline := time.Now().Add(uffdtest.Patience); m.Waiting() != n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines wait, want %d", m.Waiting(), n)
		}
	}
}

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
	awaitWaiting(t, m, 2)
	all.answer <- failure
	src.next(t, 2, 1).answer <- failure // alone
	await(t, reader, failure)
	await(t, same, failure)
	src.next(t, 0, 8).answer <- nil
	await(t, other, nil)

	// The error is forgotten, also by what is used again for another read.
	if err := m.Discard(0, m.Size()); err != nil {
		t.Fatal(err)
	}
	reader = touch(m, 2)
	src.next(t, 0, 8).answer <- failure
	src.next(t, 2, 1).answer <- failure
	await(t, reader, failure)
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

// Who waits for a page is not held up by what its reader reads after it.
func TestWaiterGoesOn(t *testing.T) {
	for range 5 {
		src := newManual(pattern(3 * pageSize))
		m := open(t, src, &lazymem.Config{Window: 1})
		reader := make(chan error, 1)
		go func() {
			reader <- m.Do(func(mem []byte) error {
				sink = mem[0] + mem[pageSize] // and reads ahead
				return nil
			})
		}()
		src.next(t, 0, 1).answer <- nil
		read := src.next(t, 1, 1)
		waiter := touch(m, 1)
		awaitWaiting(t, m, 1)
		read.answer <- nil
		ahead := src.next(t, 2, 1)
		await(t, waiter, nil)
		ahead.answer <- errors.New("disk on fire") // nobody has asked for it
		await(t, reader, nil)
	}
}

// Who waits for another's read does not wait any more after Close, even if the
// source does not give up.
func TestCloseEndsWaiting(t *testing.T) {
	src := &once{Source: counted(pattern(100)), stop: func() {}, open: make(chan struct{})}
	m := open(t, src, nil)
	reader := touch(m, 0)
	for src.reads.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	waiter := touch(m, 0)
	awaitWaiting(t, m, 1)
	closed := make(chan error, 1)
	go func() { closed <- m.Close() }()
	await(t, waiter, os.ErrClosed)
	close(src.open)
	await(t, reader, os.ErrClosed)
	await(t, closed, nil)
}

// Only pages of a read under way are waited for, not those beside it.
func TestNeighbours(t *testing.T) {
	src := newManual(pattern(3 * pageSize))
	m := open(t, src, &lazymem.Config{Window: 1})
	middle := touch(m, 1)
	read := src.next(t, 1, 1)
	for _, page := range []int{0, 2} {
		done := touch(m, page)
		src.next(t, page, 1).answer <- nil
		await(t, done, nil)
	}
	// Nor does Discard.
	for _, r := range [][2]int64{{0, int64(pageSize)}, {int64(2 * pageSize), m.Size() - int64(2*pageSize)}} {
		discarded := make(chan error, 1)
		go func() { discarded <- m.Discard(r[0], r[1]) }()
		await(t, discarded, nil)
	}
	failure := errors.New("disk on fire") // a page alone is not tried again
	read.answer <- failure
	await(t, middle, failure)
}

// striped has data in every other page, and zeros between.
type striped struct{ *manual }

func (s striped) Run(off int64) (source.Kind, int64) {
	kind := source.Data
	if off/int64(pageSize)%2 == 1 {
		kind = source.Zeros
	}
	return kind, min(int64(pageSize)-off%int64(pageSize), s.Size()-off)
}

// What fails behind the page that is needed does not matter, and does not have it
// read again.
func TestFailureBehind(t *testing.T) {
	src := newManual(pattern(4 * pageSize))
	m := open(t, striped{src}, nil)
	done, populated := touch(m, 0), make(chan error, 1)
	src.next(t, 0, 1).answer <- nil
	failure := errors.New("disk on fire")
	src.next(t, 2, 1).answer <- failure
	await(t, done, nil)
	if got := fmt.Sprint(m.Resident()); got != fmt.Sprintf("[{0 %d}]", 2*pageSize) {
		t.Errorf("resident: %s", got)
	}
	// But Populate needs that as well.
	if err := m.Discard(0, m.Size()); err != nil {
		t.Fatal(err)
	}
	go func() { populated <- m.Populate(t.Context(), 0, m.Size(), nil) }()
	src.next(t, 0, 1).answer <- nil
	for range 3 { // behind page 0, then with page 3, then alone
		src.next(t, 2, 1).answer <- failure
	}
	await(t, populated, failure)
}

// Discard waits for the reads of its pages.
func TestDiscardWaits(t *testing.T) {
	src := newManual(pattern(3 * pageSize))
	m := open(t, src, nil)
	reader := touch(m, 1)
	read := src.next(t, 0, 3)
	discarded := make(chan error, 1)
	go func() { discarded <- m.Discard(int64(2*pageSize), int64(pageSize)) }()
	settle()
	if len(discarded) > 0 {
		t.Error("Discard did not wait")
	}
	read.answer <- nil
	await(t, reader, nil)
	await(t, discarded, nil)
	if got := fmt.Sprint(m.Resident()); got != fmt.Sprintf("[{0 %d}]", 2*pageSize) {
		t.Errorf("resident: %s", got)
	}
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
