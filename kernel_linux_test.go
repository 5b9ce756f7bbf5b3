package uffd_test

import (
	"bytes"
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

// next returns the next message of f.
func next(t testing.TB, f *uffd.File) uffd.Msg {
	t.Helper()
	if err := f.SetReadDeadline(time.Now().Add(uffdtest.Patience)); err != nil {
		t.Fatal(err)
	}
	m, err := f.ReadMsg()
	if err != nil {
		t.Fatalf("waiting for a message: %v", err)
	}
	return m
}

// nextFault returns the next message of f, which must be a fault in r with these
// flags.
func nextFault(t testing.TB, f *uffd.File, r uffd.Range, flags uffd.PagefaultFlags) uffd.Pagefault {
	t.Helper()
	m := next(t, f)
	p, ok := m.Pagefault()
	if !ok || !r.Contains(p.Addr) || p.Flags != flags {
		t.Fatalf("got %v, want a fault %v in %v", &m, flags, r)
	}
	return p
}

// quiet fails if f has a message.
func quiet(t testing.TB, f *uffd.File) {
	t.Helper()
	if err := f.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if m, err := f.ReadMsg(); err == nil {
		t.Fatalf("unexpected %v", &m)
	}
}

func register(t testing.TB, f *uffd.File, r uffd.Range, mode uffd.RegisterMode) uffd.Ioctls {
	t.Helper()
	ioctls, err := f.Register(r, mode)
	if err != nil {
		t.Fatal(err)
	}
	return ioctls
}

// page returns a page full of b.
func page(kind uffdtest.Kind, b byte) []byte {
	return bytes.Repeat([]byte{b}, kind.PageSize())
}

func TestCopyResolvesFault(t *testing.T) {
	for _, kind := range uffdtest.Kinds {
		t.Run(kind.String(), func(t *testing.T) {
			if kind.Huge() {
				uffdtest.LockSettings(t).HugePages(2)
			}
			p := uffdtest.Start(t)
			mem := p.Map(kind, 2)
			f := p.Open(nil)
			register(t, f, mem.Range, uffd.RegisterMissing)
			load := p.Load(mem.Page(1).Start + 5)
			nextFault(t, f, mem.Page(1), 0)
			n, err := f.Copy(mem.Page(1).Start, page(kind, 42), 0)
			if n != int64(kind.PageSize()) || err != nil {
				t.Fatalf("Copy = %d, %v", n, err)
			}
			if b := load.Value(); b != 42 {
				t.Errorf("loaded %d, want 42", b)
			}
			n, err = f.Copy(mem.Page(1).Start, page(kind, 43), 0)
			if n != 0 || !errors.Is(err, unix.EEXIST) {
				t.Errorf("second Copy = %d, %v; want 0, EEXIST", n, err)
			}
			quiet(t, f)
		})
	}
}

// TestServe runs the handler of the package's doc.
func TestServe(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 16)
	f := p.Open(nil)
	register(t, f, mem.Range, uffd.RegisterMissing)
	var image []byte
	want := uint64(0)
	for i := range mem.Pages() {
		image = append(image, page(mem.Kind, byte(i+1))...)
		want += uint64(i + 1)
	}
	result := make(chan error, 1)
	go func() { result <- serve(f, mem.Start, image) }()
	first, second := p.Touch(mem), p.Touch(mem)
	if a, b := first.Value(), second.Value(); a != want || b != want {
		t.Errorf("the pages add up to %d and %d, want %d", a, b, want)
	}
	f.Close()
	wait(t, result, os.ErrClosed)
}
