package lazymem_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd/lazymem"
	"github.com/go-uffd/uffd/source"
)

// A copy that is started again must not find its source changed by itself.
func TestOverlap(t *testing.T) {
	data := pattern(1 << 20)
	const pages = 16
	for name, move := range map[string]func(m *lazymem.Memory, p []byte, off int64) (int, error){
		"ReadAt":  (*lazymem.Memory).ReadAt,
		"WriteAt": (*lazymem.Memory).WriteAt,
	} {
		for _, at := range []int{0, 1, 3 * pageSize, 6 * pageSize} { // of p; the other end is at 3 pages
			m := open(t, counted(data), &lazymem.Config{Window: 1})
			err := m.Do(func(mem []byte) error {
				n, err := move(m, mem[at:at+pages*pageSize], int64(3*pageSize))
				if n != 0 || err == nil {
					t.Errorf("%s from or to %d: %d, %v", name, at, n, err)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
			got := make([]byte, len(data))
			if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%s from or to %d: the memory has changed, or %v", name, at, err)
			}
		}
	}
	// Side by side is no overlap.
	m := open(t, counted(data), &lazymem.Config{Window: 1})
	err := m.Do(func(mem []byte) error {
		if n, err := m.WriteAt(mem[:2*pageSize], int64(2*pageSize)); err != nil || n != 2*pageSize {
			t.Errorf("WriteAt = %d, %v", n, err)
		}
		if n, err := m.ReadAt(mem[6*pageSize:8*pageSize], int64(4*pageSize)); err != nil || n != 2*pageSize {
			t.Errorf("ReadAt = %d, %v", n, err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	want := bytes.Clone(data)
	copy(want[2*pageSize:4*pageSize], data)
	copy(want[6*pageSize:8*pageSize], data[4*pageSize:])
	got := make([]byte, len(data))
	if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("wrong contents, or %v", err)
	}
}

// The function of Do starts from its beginning after each fault, and what it did
// to the memory or outside stays; where all is populated it runs once.
func TestStartedAgain(t *testing.T) {
	data := pattern(1 << 20)
	changed := bytes.Clone(data)
	for i := range changed {
		changed[i] ^= 0x55
	}
	for _, populated := range []bool{false, true} {
		m := open(t, counted(data), nil)
		if populated {
			if err := m.Populate(t.Context(), 0, m.Size(), nil); err != nil {
				t.Fatal(err)
			}
		}
		count := 0
		err := m.Do(func(mem []byte) error {
			for i := range mem {
				mem[i] ^= 0x55
				count++
			}
			return nil
		})
		got := make([]byte, len(data))
		if err == nil {
			_, err = m.ReadAt(got, 0)
		}
		if once := bytes.Equal(got, changed) && count == len(data); err != nil || once != populated {
			t.Errorf("populated=%t: changed once: %t, %v", populated, once, err)
		}
	}
}

// With GODEBUG=panicnil=1, recover does not tell panic(nil) from no panic.
func TestPanicNil(t *testing.T) {
	t.Setenv("GODEBUG", "panicnil=1")
	m := open(t, counted(pattern(1<<20)), nil)
	runs := 0
	err := m.Do(func(mem []byte) error {
		runs++
		panic(nil)
	})
	if err == nil || runs != 1 {
		t.Errorf("Do = %v after %d runs", err, runs)
	}
}

// If the read panics, or ends its goroutine, for which others wait, one of them
// tries.
func TestSharedPanic(t *testing.T) {
	for name, stop := range map[string]func(){
		"panic":  func() { panic("of the source") },
		"Goexit": runtime.Goexit,
	} {
		t.Run(name, func(t *testing.T) {
			src := &once{Source: counted(pattern(1 << 20)), stop: stop, open: make(chan struct{})}
			m := open(t, src, nil)
			var group sync.WaitGroup
			var running, stopped, good atomic.Int64
			for range 16 {
				group.Go(func() {
					defer func() {
						if recover() != nil {
							stopped.Add(1)
						}
					}()
					err := m.Do(func(mem []byte) error {
						running.Add(1)
						runtime.KeepAlive(mem[0])
						return nil
					})
					if err != nil {
						t.Error(err)
					}
					good.Add(1)
				})
			}
			for running.Load() < 16 {
				time.Sleep(time.Millisecond)
			}
			close(src.open)
			group.Wait()
			if good.Load() != 15 || name == "panic" && stopped.Load() != 1 {
				t.Errorf("%d succeeded, %d panicked", good.Load(), stopped.Load())
			}
		})
	}
}

// once is a source whose first read does not return.
type once struct {
	source.Source
	reads atomic.Int64
	stop  func()
	open  chan struct{}
}

func (o *once) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if o.reads.Add(1) == 1 {
		<-o.open
		o.stop()
	}
	return o.Source.ReadAt(ctx, p, off)
}

// SetPanicOnFault is after Do what it was before, and the same for the source.
func TestPanicOnFaultRestored(t *testing.T) {
	for _, want := range []bool{false, true} {
		old := debug.SetPanicOnFault(want)
		defer debug.SetPanicOnFault(old)
		is := func(when string) {
			t.Helper()
			if got := debug.SetPanicOnFault(want); got != want {
				t.Errorf("%s: %t, want %t", when, got, want)
			}
		}
		inSource := &asking{Source: counted(pattern(1 << 20)), ask: func() { is("in the source") }}
		m, other := open(t, inSource, nil), open(t, counted(pattern(1<<20)), nil)
		m.Do(func(mem []byte) error {
			sink = mem[0]
			other.Do(func(o []byte) error {
				sink = o[0] + mem[500_000]
				return nil
			})
			if !debug.SetPanicOnFault(true) {
				t.Error("a Do inside has switched it off")
			}
			return nil
		})
		is("after Do")
		caught(func() { m.Do(func(mem []byte) error { panic("f") }) })
		is("after a panic")
		if err := m.Discard(0, m.Size()); err != nil {
			t.Fatal(err)
		}
		m.ReadAt(make([]byte, 10), 0)
		is("after ReadAt")
	}
}

// asking is a source that calls ask in each read.
type asking struct {
	source.Source
	ask func()
}

func (a *asking) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	a.ask()
	return a.Source.ReadAt(ctx, p, off)
}

// A source may close the memory that it fills, but not discard it.
func TestSourceUsesMemory(t *testing.T) {
	src := &asking{Source: counted(pattern(1 << 20))}
	m := open(t, src, nil)
	src.ask = func() {
		if err := m.Discard(0, m.Size()); err == nil {
			t.Error("Discard in the source succeeded")
		}
	}
	if _, err := m.ReadAt(make([]byte, 10), 0); err != nil {
		t.Error(err)
	}
	src.ask = func() {
		if err := m.Close(); err != nil {
			t.Errorf("Close in the source: %v", err)
		}
	}
	err := m.Do(func(mem []byte) error { sink = mem[len(mem)-1]; return nil })
	if !errors.Is(err, os.ErrClosed) {
		t.Errorf("Do = %v, want ErrClosed", err)
	}
}

// A hole that somebody punches into the file is found out.
func TestHolePunched(t *testing.T) {
	m := open(t, counted(pattern(1<<20)), &lazymem.Config{Shared: true})
	if err := m.Populate(t.Context(), 0, m.Size(), nil); err != nil {
		t.Fatal(err)
	}
	f, err := m.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := int64(3 * pageSize)
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, int64(pageSize)); err != nil {
		t.Fatal(err)
	}
	var e *lazymem.Error
	if n, err := m.ReadAt(make([]byte, 10), at); n != 0 || !errors.Is(err, lazymem.ErrLost) || !errors.As(err, &e) || e.Off != at {
		t.Errorf("ReadAt = %d, %v; want ErrLost", n, err)
	}
}
