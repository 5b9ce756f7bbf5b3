package lazymem_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd/lazymem"
	"github.com/go-uffd/uffd/source"
)

// caught calls f and returns what it panicked with.
func caught(f func()) (r any) {
	defer func() { r = recover() }()
	f()
	return nil
}

// panicking is a source that panics while it is told to.
type panicking struct {
	source.Source
	with any
}

func (p *panicking) ReadAt(ctx context.Context, b []byte, off int64) (int, error) {
	if p.with != nil {
		panic(p.with)
	}
	return p.Source.ReadAt(ctx, b, off)
}

// knownOffset is what is known of an offset at which there was a fault.
func knownOffset(off int) int {
	if runtime.GOARCH == "s390x" {
		off -= off % pageSize
	}
	return off
}

// What is not a fault in the memory passes through Do as it is.
func TestForeignPanics(t *testing.T) {
	src := &panicking{Source: counted(pattern(1 << 20))}
	m := open(t, src, nil)
	cause := errors.New("cause")
	src.with = cause
	for range 2 { // the second finds no fill left over
		if r := caught(func() { m.ReadAt(make([]byte, 1), 0) }); r != any(cause) {
			t.Errorf("ReadAt with a source that panics: %v, want %v", r, cause)
		}
		if r := caught(func() { m.Do(func(mem []byte) error { sink = mem[0]; return nil }) }); r != any(cause) {
			t.Errorf("Do with a source that panics: %v, want %v", r, cause)
		}
	}
	src.with = nil

	if r := caught(func() { m.Do(func(mem []byte) error { sink = mem[0]; panic(cause) }) }); r != any(cause) {
		t.Errorf("Do of a function that panics: %v, want %v", r, cause)
	}
	var nilPointer *[100]byte
	r := caught(func() { m.Do(func(mem []byte) error { sink = mem[0] + nilPointer[5]; return nil }) })
	if e, ok := r.(runtime.Error); !ok || !strings.Contains(e.Error(), "nil pointer") {
		t.Errorf("Do with a nil dereference: %v", r)
	}

	// A mapped file that is truncated raises SIGBUS, too.
	file, err := os.CreateTemp(t.TempDir(), "")
	if err == nil {
		err = file.Truncate(1)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	mapped, err := unix.Mmap(int(file.Fd()), 0, 2*pageSize, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mapped)
	r = caught(func() { m.Do(func(mem []byte) error { sink = mem[0] + mapped[pageSize+3]; return nil }) })
	if e, ok := r.(interface{ Addr() uintptr }); !ok || e.Addr() != address(mapped[knownOffset(pageSize+3):]) {
		t.Errorf("Do with a SIGBUS elsewhere: %v", r)
	}
	if debug.SetPanicOnFault(false) {
		t.Error("SetPanicOnFault was left on")
	}

	// Goexit ends the goroutine, and Do does not stand in its way.
	var group sync.WaitGroup
	went := true
	group.Go(func() {
		m.Do(func(mem []byte) error { runtime.Goexit(); return nil })
		went = false
	})
	group.Wait()
	if !went {
		t.Error("Do returned after Goexit")
	}
	// And the memory still works.
	if _, err := m.ReadAt(make([]byte, 1<<20), 0); err != nil {
		t.Error(err)
	}
}

// header reads lazily filled memory in its String method, in which fmt recovers
// from panics.
type header []byte

func (h header) String() string { return fmt.Sprintf("version %d", h[0]) }

func TestSwallowed(t *testing.T) {
	other := open(t, counted(pattern(1<<20)), nil)
	failure := errors.New("half done")
	off := 5*pageSize + 123
	swallow := func(mem []byte) {
		defer func() { recover() }()
		sink = mem[off]
	}
	touchOther := func() error {
		return other.Do(func(mem []byte) error { sink = mem[0]; return other.Discard(0, other.Size()) })
	}
	for name, f := range map[string]func(m *lazymem.Memory, mem []byte) error{
		"recover": func(m *lazymem.Memory, mem []byte) error { swallow(mem); return nil },
		"fmt":     func(m *lazymem.Memory, mem []byte) error { _ = fmt.Sprint(header(mem[off:])); return nil },
		"error":   func(m *lazymem.Memory, mem []byte) error { swallow(mem); return failure },
		"write": func(m *lazymem.Memory, mem []byte) error {
			defer func() { recover() }()
			mem[off] = 1
			return nil
		},
		"then another memory": func(m *lazymem.Memory, mem []byte) error { swallow(mem); return touchOther() },
		"then the same memory": func(m *lazymem.Memory, mem []byte) error {
			swallow(mem)
			return m.Do(func(mem []byte) error { sink = mem[len(mem)-1]; return nil })
		},
		"in another Do": func(m *lazymem.Memory, mem []byte) error {
			return other.Do(func([]byte) error { swallow(mem); return nil })
		},
		"in another Do that faults": func(m *lazymem.Memory, mem []byte) error {
			return other.Do(func(o []byte) error {
				sink = o[0]
				swallow(mem)
				return other.Discard(0, other.Size())
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := open(t, counted(pattern(1<<20)), nil)
			err := m.Do(func(mem []byte) error { return f(m, mem) })
			var e *lazymem.Error
			if !errors.Is(err, lazymem.ErrSwallowed) || !errors.As(err, &e) || e.Off != int64(knownOffset(off)) {
				t.Errorf("Do = %v, want ErrSwallowed at %d", err, off)
			}
			if name == "error" && !errors.Is(err, failure) {
				t.Errorf("Do = %v, which hides what the function returned", err)
			}
			// Faults before and in calls inside are none of its business.
			if err := m.Discard(0, m.Size()); err != nil {
				t.Fatal(err)
			}
			err = m.Do(func(mem []byte) error {
				sink = mem[off]
				if err := touchOther(); err != nil {
					return err
				}
				if err := m.Discard(0, m.Size()); err != nil {
					return err
				}
				if _, err := m.ReadAt(make([]byte, 10), 9999); err != nil {
					return err
				}
				return m.Do(func(mem []byte) error {
					sink = mem[20*pageSize]
					return nil
				})
			})
			if err != nil {
				t.Errorf("Do without a swallowed fault = %v", err)
			}
		})
	}
}

// A fault in the memory before Do is none of its business.
func TestFaultBefore(t *testing.T) {
	m := open(t, counted(pattern(1<<20)), nil)
	var kept []byte
	if err := m.Do(func(mem []byte) error { kept = mem; return nil }); err != nil {
		t.Fatal(err)
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	if caught(func() { sink = kept[0] }) == nil {
		t.Fatal("the slice of Do was good after it")
	}
	if err := m.Do(func([]byte) error { return nil }); err != nil {
		t.Errorf("Do = %v", err)
	}
}

// What Do cannot protect from, and does not find out either, is as the package's
// documentation says.
func TestUnprotected(t *testing.T) {
	// A lock that is not released by defer is still held in the second run.
	m := open(t, counted(pattern(1<<20)), nil)
	var mu sync.Mutex
	locked := errors.New("locked")
	add := func(mem []byte) error {
		if !mu.TryLock() {
			return locked
		}
		sink += mem[0]
		mu.Unlock()
		return nil
	}
	if err := m.Do(add); err != locked {
		t.Errorf("Do with a lock that a fault left locked = %v", err)
	}
	mu.Unlock()
	if err := m.Do(add); err != nil { // the page is there now
		t.Error(err)
	}
	if err := m.Discard(0, m.Size()); err != nil {
		t.Fatal(err)
	}
	err := m.Do(func(mem []byte) error {
		if !mu.TryLock() {
			return locked
		}
		defer mu.Unlock()
		sink += mem[0]
		return nil
	})
	if err != nil {
		t.Errorf("Do with a lock and defer = %v", err)
	}

	// A sync.Once does not run again.
	if err := m.Discard(0, m.Size()); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	done := false
	err = m.Do(func(mem []byte) error {
		once.Do(func() {
			sink = mem[0]
			done = true
		})
		return nil
	})
	if err != nil || done {
		t.Errorf("Do with a sync.Once = %v, done: %t", err, done)
	}

	// A fault elsewhere hides one that was swallowed before it.
	if err := m.Discard(0, m.Size()); err != nil {
		t.Fatal(err)
	}
	var nilPointer *[100]byte
	err = m.Do(func(mem []byte) error {
		caught(func() { sink = mem[0] })
		caught(func() { sink = nilPointer[5] })
		return nil
	})
	if err != nil {
		t.Errorf("Do = %v: then the documentation can promise more", err)
	}
}

// A recover that panics again does not hide a fault.
func TestPanicAgain(t *testing.T) {
	data := pattern(1 << 20)
	m := open(t, counted(data), nil)
	err := m.Do(func(mem []byte) error {
		defer func() {
			if r := recover(); r != nil {
				panic(r)
			}
		}()
		if mem[7777] != data[7777] {
			return errors.New("wrong contents")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestNested(t *testing.T) {
	data := pattern(1 << 20)
	inner := open(t, counted(data), nil)
	outer := open(t, source.FromReaderAt(inner, inner.Size()), nil)
	err := outer.Do(func(o []byte) error {
		return inner.Do(func(i []byte) error { // faults in o pass through inner's Do
			if !bytes.Equal(o, data) || !bytes.Equal(i, data) {
				return errors.New("wrong contents")
			}
			return nil
		})
	})
	if err != nil {
		t.Error(err)
	}
	for _, m := range []*lazymem.Memory{inner, outer} {
		if err := m.Discard(0, m.Size()); err != nil {
			t.Fatal(err)
		}
	}
	// From missing memory to missing memory.
	other := open(t, counted(make([]byte, len(data))), nil)
	err = other.Do(func(o []byte) error {
		_, err := outer.ReadAt(o[10:], 10)
		return err
	})
	if err != nil {
		t.Error(err)
	}
	got := make([]byte, len(data))
	if _, err := other.ReadAt(got, 0); err != nil || !bytes.Equal(got[10:], data[10:]) {
		t.Errorf("wrong contents, or %v", err)
	}
}

// circle is a source that reads the memory that it fills.
type circle struct {
	source.Source
	m *lazymem.Memory
}

func (c *circle) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return c.m.ReadAt(p, off)
}

func TestCircle(t *testing.T) {
	c := &circle{Source: source.Zero(1 << 20)}
	a := open(t, hideZeros{c}, nil)
	c.m = open(t, source.FromReaderAt(a, a.Size()), nil) // by way of another memory
	if n, err := a.ReadAt(make([]byte, 10), 0); n != 0 || err == nil || !strings.Contains(err.Error(), "the very memory") {
		t.Errorf("ReadAt = %d, %v", n, err)
	}
}

// hideZeros is a source that is not Sparse.
type hideZeros struct{ source.Source }

func TestClose(t *testing.T) {
	g := newGate(counted(pattern(1 << 20)))
	m, err := lazymem.New(g, &lazymem.Config{Shared: true})
	if err != nil {
		t.Fatal(err)
	}
	// One goroutine waits for the source, one for the other, one is inside, one
	// populates under a context of its own.
	errs := make(chan error)
	touch := func() {
		errs <- m.Do(func(mem []byte) error { sink = mem[0]; return nil })
	}
	go touch()
	<-g.entered
	go touch()
	in, out := make(chan bool), make(chan bool)
	go func() {
		errs <- m.Do(func(mem []byte) error {
			in <- true
			<-out
			sink = mem[500_000]
			return nil
		})
	}()
	<-in
	go func() { errs <- m.Populate(context.Background(), 600_000, 10, nil) }()
	<-g.entered
	if err := m.Close(); err != nil {
		t.Errorf("Close = %v", err)
	}
	close(out)
	for range 4 {
		if err := <-errs; !errors.Is(err, os.ErrClosed) {
			t.Errorf("a call that was under way = %v, want ErrClosed", err)
		}
	}
	if len(g.entered) > 0 {
		t.Error("the source was read after Close")
	}
	p := make([]byte, 1)
	_, readErr := m.ReadAt(p, 0)
	_, writeErr := m.WriteAt(p, 0)
	_, bytesErr := m.Bytes()
	_, fileErr := m.File()
	_, nothingErr := m.ReadAt(nil, 0)
	for name, err := range map[string]error{
		"ReadAt":   readErr,
		"WriteAt":  writeErr,
		"Bytes":    bytesErr,
		"File":     fileErr,
		"Do":       m.Do(func([]byte) error { return nil }),
		"Populate": m.Populate(t.Context(), 0, 10, nil),
		"Discard":  m.Discard(0, m.Size()),
		"Close":    m.Close(),

		// Nor does what would have nothing to do succeed.
		"ReadAt of nothing":   nothingErr,
		"Populate of nothing": m.Populate(t.Context(), 0, 0, nil),
		"Discard of nothing":  m.Discard(0, 1),
	} {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s after Close = %v", name, err)
		}
	}
}

// slow is a source that does not give up when it is told to.
type slow struct {
	source.Source
	entered chan bool
	over    atomic.Bool
}

func (s *slow) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	s.entered <- true
	<-ctx.Done()
	time.Sleep(20 * time.Millisecond)
	s.over.Store(true)
	return 0, ctx.Err()
}

func TestCloseWaitsForSource(t *testing.T) {
	src := &slow{Source: counted(pattern(100)), entered: make(chan bool)}
	m := open(t, src, nil)
	done := make(chan error)
	go func() {
		_, err := m.ReadAt(make([]byte, 1), 0)
		done <- err
	}()
	<-src.entered
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if !src.over.Load() {
		t.Error("Close returned while the source was read")
	}
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("ReadAt = %v, want ErrClosed", err)
	}
}

func TestCloseInside(t *testing.T) {
	m := open(t, counted(pattern(1<<20)), nil)
	err := m.Do(func(mem []byte) error {
		sink = mem[0]
		if err := m.Close(); err != nil {
			return err
		}
		sink = mem[0] // was there
		return nil
	})
	if !errors.Is(err, os.ErrClosed) {
		t.Errorf("Do = %v, want ErrClosed", err)
	}
}

// Close in the midst of readers never lets them see zeros.
func TestCloseRace(t *testing.T) {
	data := bytes.Repeat([]byte("nonzero "), 64<<10)
	for range 50 {
		m, err := lazymem.New(counted(data), &lazymem.Config{Window: 1})
		if err != nil {
			t.Fatal(err)
		}
		var group sync.WaitGroup
		for w := range 4 {
			group.Go(func() {
				p := make([]byte, 3*pageSize)
				for off := w * 64; ; off = (off + 4096) % (len(data) - len(p)) {
					clear(p)
					_, err := m.ReadAt(p, int64(off))
					if err == nil {
						err = m.Do(func(mem []byte) error {
							if mem[off] == 0 {
								return errors.New("a zero in Do")
							}
							return nil
						})
					}
					if errors.Is(err, os.ErrClosed) {
						return
					}
					if err != nil || bytes.IndexByte(p, 0) >= 0 {
						t.Errorf("zeros, or %v", err)
						return
					}
				}
			})
		}
		runtime.Gosched()
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		group.Wait()
	}
}
