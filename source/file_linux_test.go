package source_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd/source"
)

// A sparse file on tmpfs has its holes where they were made.
func TestFileHoles(t *testing.T) {
	const part = 1 << 16
	fd, err := unix.MemfdCreate("sparse", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	mem := os.NewFile(uintptr(fd), "sparse")
	defer mem.Close()
	if _, err := mem.WriteAt(bytes.Repeat([]byte("a"), part), part); err != nil {
		t.Fatal(err)
	}
	if err := mem.Truncate(4 * part); err != nil {
		t.Fatal(err)
	}
	f := openFile(t, "/proc/self/fd/"+strconv.Itoa(fd))
	for _, want := range []struct {
		off  int64
		kind source.Kind
		n    int64
	}{{0, source.Hole, part}, {part, source.Data, part}, {part + 5, source.Data, part - 5}, {2 * part, source.Hole, 2 * part}} {
		if kind, n := f.Run(want.off); kind != want.kind || n != want.n {
			t.Errorf("at %#x: %v, %#x; want %v, %#x", want.off, kind, n, want.kind, want.n)
		}
	}
}

// A file that is truncated is an error and no signal.
func TestFileTruncated(t *testing.T) {
	page := os.Getpagesize()
	name := writeFile(t, page, bytes.Repeat([]byte("a"), page), bytes.Repeat([]byte("b"), page))
	f := openFile(t, name)
	if err := os.Truncate(name, int64(page)); err != nil {
		t.Fatal(err)
	}
	if err := source.Read(t.Context(), f, make([]byte, 2*page), 0); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("Read: %v, want io.ErrUnexpectedEOF", err)
	}
	sink, err := os.Create(name + ".sink")
	if err != nil {
		t.Fatal(err)
	}
	defer sink.Close()
	err = source.Borrow(f, int64(page), page, func(p []byte) error {
		_, err := sink.Write(p)
		return err
	})
	if !errors.Is(err, unix.EFAULT) {
		t.Errorf("a system call on what is gone: %v, want EFAULT", err)
	}
	if err := source.Read(t.Context(), f, make([]byte, page), 0); err != nil {
		t.Errorf("Read of what is left: %v", err)
	}
}

func TestBorrowDoesNotAllocate(t *testing.T) {
	page := os.Getpagesize()
	f := openFile(t, writeFile(t, page, bytes.Repeat([]byte("a"), page)))
	var l source.Source = source.Layer(f)
	sum := 0
	use := func(p []byte) error { sum += len(p); return nil }
	if n := testing.AllocsPerRun(100, func() {
		if err := source.Borrow(l, 0, page, use); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
