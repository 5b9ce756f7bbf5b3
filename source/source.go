// Package source says where the contents of memory come from: a [Source] is a
// fixed array of bytes that can be read in any order, an [io.ReaderAt] with a
// context and a size.
//
// Sources are ready-made from an io.ReaderAt ([FromReaderAt]), a byte slice
// ([FromBytes]), a file that is mapped ([OpenFile]), a base with diffs on top of
// it ([Layer]), and zeros ([Zero]).
//
// A Source may be able to do more, and says so by further methods: [Borrower]
// gives access to bytes that are in memory already, and [Sparse] tells data from
// holes. Callers use [Read], [Borrow] and [RunAt], which work with every Source.
//
// The contents of a Source must not change while it is in use.
package source

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// Source is a fixed array of bytes. Its methods are called concurrently.
type Source interface {
	// ReadAt reads len(p) bytes from offset off on, as io.ReaderAt does: it
	// returns how many it read, with an error if they are fewer. It may take
	// its time, but should give up when ctx ends. It must not keep p.
	//
	// Callers ask for bytes within the size only.
	ReadAt(ctx context.Context, p []byte, off int64) (n int, err error)

	// Size returns the number of bytes. It does not change.
	Size() int64
}

// Borrower is a Source with bytes in memory.
type Borrower interface {
	Source

	// Borrow calls use with the n bytes at offset off, and returns what use
	// returned. The bytes stay valid until then. They are only to be read, and
	// only by system calls: a mapping whose file was truncated fails those with
	// EFAULT, but kills whoever touches it.
	//
	// It does not wait: bytes that are not in memory, or not in one piece, are
	// ErrNotInMemory, and are got with ReadAt.
	Borrow(off int64, n int, use func(p []byte) error) error
}

// ErrNotInMemory is the answer of a Borrower that has to be asked with ReadAt.
var ErrNotInMemory = errors.New("source: not in memory")

// Kind is what a run of bytes is.
type Kind uint8

const (
	Data  Kind = iota // has to be read
	Zeros             // is zeros, and need not be read
	Hole              // is nothing: the layer below is seen, and at the bottom zeros
)

// String returns the kind's name.
func (k Kind) String() string {
	switch k {
	case Data:
		return "data"
	case Zeros:
		return "zeros"
	case Hole:
		return "hole"
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// Sparse is a Source that knows which of its bytes need not be read.
type Sparse interface {
	Source

	// Run returns the kind of the byte at off, which lies within the size, and
	// how many bytes from there on are alike. It does not wait.
	Run(off int64) (k Kind, n int64)
}

// RunAt returns the kind of the byte at off and how many bytes from there on are
// alike: of a Source that is not Sparse all bytes are Data. At the size and
// behind it there is a Hole without end, of length 1<<63 - 1 - off. A source that
// panics has Data: reading it says more.
func RunAt(s Source, off int64) (k Kind, n int64) {
	defer func() {
		if recover() != nil {
			k, n = Data, 1<<63-1-max(off, 0)
		}
	}()
	size := s.Size()
	if off < 0 || off >= size {
		return Hole, 1<<63 - 1 - max(off, 0)
	}
	rest := size - off
	sparse, ok := s.(Sparse)
	if !ok {
		return Data, rest
	}
	k, n = sparse.Run(off)
	if k > Hole || n <= 0 || n > rest { // a broken Run costs speed, not bytes
		return Data, rest
	}
	return k, n
}

// Read fills p with the bytes from off on. What lies behind the size becomes
// zeros: the last page of memory is mostly longer than its source. A source
// that has fewer bytes than its size is io.ErrUnexpectedEOF; one that panics
// is an error, too.
func Read(ctx context.Context, s Source, p []byte, off int64) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("source: reading %d bytes at %d: panic: %v", len(p), off, r)
		}
	}()
	if off < 0 {
		return fmt.Errorf("source: negative offset %d", off)
	}
	have := p[:min(max(s.Size()-off, 0), int64(len(p)))]
	clear(p[len(have):])
	if len(have) == 0 {
		return nil
	}
	n, err := s.ReadAt(ctx, have, off)
	switch {
	case n >= len(have):
		return nil
	case err == nil, errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("source: reading %d bytes at %d: %w", len(have), off, err)
}

// Borrow calls use with the n bytes at off if s has them in memory: see
// [Borrower]. If not, or if they reach behind the size, it returns
// ErrNotInMemory.
func Borrow(s Source, off int64, n int, use func(p []byte) error) error {
	b, ok := s.(Borrower)
	if !ok || !within(off, n, s.Size()) {
		return ErrNotInMemory
	}
	return b.Borrow(off, n, use)
}

// within reports whether there are n bytes at off.
func within(off int64, n int, size int64) bool {
	return off >= 0 && n > 0 && off <= size-int64(n)
}

// FromReaderAt returns a Source of the first size bytes of r. A read of r that
// does not end is not ended by a context either.
func FromReaderAt(r io.ReaderAt, size int64) Source { return &reader{r, size} }

type reader struct {
	r    io.ReaderAt
	size int64
}

func (r *reader) Size() int64 { return r.size }

func (r *reader) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.ReadAt(p, off)
}

// FromBytes returns a Source of b, which must not change any more.
func FromBytes(b []byte) Borrower { return memory(b) }

type memory []byte

func (m memory) Size() int64 { return int64(len(m)) }

func (m memory) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	if off >= int64(len(m)) {
		return 0, io.EOF
	}
	n := copy(p, m[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m memory) Borrow(off int64, n int, use func(p []byte) error) error {
	if !within(off, n, m.Size()) {
		return ErrNotInMemory
	}
	return use(m[off : off+int64(n)])
}

// Zero returns a Source of size zeros.
func Zero(size int64) Sparse { return zero(size) }

type zero int64

func (z zero) Size() int64                 { return int64(z) }
func (z zero) Run(off int64) (Kind, int64) { return Zeros, int64(z) - off }

func (z zero) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	n := min(max(int64(z)-off, 0), int64(len(p)))
	clear(p[:n])
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}
