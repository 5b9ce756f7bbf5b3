package source

import (
	"context"
	"fmt"
	"io"
	"os"
	"sort"
	"sync"
)

// File is a Source of the contents of a file. On Linux it is mapped: its bytes go
// from the page cache to where they are needed without a copy in between, and
// the holes of a sparse file are known. Where it cannot be mapped it is read.
//
// To lend bytes that are not in the page cache, the kernel has to read them from
// the disk, and the borrower waits without knowing. For files on slow storage
// use [FromReaderAt].
//
// The file must not change. One that is truncated is found out where whole pages
// are gone: reading and lending them fail. But what is lent of the page in which
// the new end lies has zeros behind it.
type File struct {
	file *os.File
	size int64

	mu     sync.RWMutex // held for reading while bytes are lent
	closed bool
	mapped []byte   // nil if the file is not mapped
	data   []extent // the parts that are not holes
}

// An extent is a part of a file.
type extent struct{ start, end int64 }

// OpenFile opens a regular file.
func OpenFile(name string) (*File, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	f, err := newFile(file)
	if err != nil {
		file.Close()
		return nil, err
	}
	return f, nil
}

func newFile(file *os.File) (*File, error) {
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("source: %s is not a regular file: use FromReaderAt", file.Name())
	}
	f := &File{file: file, size: info.Size()}
	f.data = extents(file, f.size)
	f.mapped = mapFile(file, f.size)
	return f, nil
}

// Size returns the size that the file had when it was opened.
func (f *File) Size() int64 { return f.size }

// ReadAt reads from the file.
func (f *File) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	n, err := f.file.ReadAt(p, off)
	if err == io.EOF && off+int64(n) < f.size {
		err = fmt.Errorf("%s was truncated: %w", f.file.Name(), io.ErrUnexpectedEOF)
	}
	return n, err
}

// Borrow lends bytes of the mapping: see [Borrower]. Close waits until they are
// returned.
func (f *File) Borrow(off int64, n int, use func(p []byte) error) error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.closed {
		return os.ErrClosed
	}
	if f.mapped == nil || !within(off, n, f.size) {
		return ErrNotInMemory
	}
	return use(f.mapped[off : off+int64(n)])
}

// Run tells data from the holes of a sparse file, as they were when it was
// opened: see [Sparse].
func (f *File) Run(off int64) (Kind, int64) {
	if !within(off, 1, f.size) {
		return Hole, 0
	}
	i := sort.Search(len(f.data), func(i int) bool { return f.data[i].end > off })
	switch {
	case i == len(f.data):
		return Hole, f.size - off
	case off < f.data[i].start:
		return Hole, f.data[i].start - off
	}
	return Data, f.data[i].end - off
}

// Close closes the file, after all bytes that are lent have been returned.
// Reading and lending fail from then on with [os.ErrClosed].
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return os.ErrClosed
	}
	f.closed = true
	unmapFile(f.mapped)
	return f.file.Close()
}
