package lazymem_test

import (
	"context"
	"encoding/binary"
	"runtime"
	"sync/atomic"
	"unsafe"

	"github.com/go-uffd/uffd/source"
)

// countingSource counts what is read.
type countingSource struct {
	source.Source
	reads, bytes atomic.Int64
	allocate     bool // in each read
}

func (s *countingSource) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	s.reads.Add(1)
	s.bytes.Add(int64(len(p)))
	if s.allocate {
		runtime.KeepAlive(make([]byte, 2<<20))
	}
	return s.Source.ReadAt(ctx, p, off)
}

func nativeUint32(p []byte) uint32 { return binary.NativeEndian.Uint32(p) }

func address(mem []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(mem))) }
