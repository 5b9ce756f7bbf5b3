package uffd_test

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

// BenchmarkFault serves the faults of another process, one at a time.
func BenchmarkFault(b *testing.B) {
	p := uffdtest.Start(b)
	mem := p.Map(uffdtest.Anon, 4096)
	f := p.Open(nil)
	register(b, f, mem.Range, uffd.RegisterMissing)
	src := page(mem.Kind, 1)
	msgs := make([]uffd.Msg, 4)
	b.ReportAllocs()
	touch, served := p.Touch(mem), 0
	for b.Loop() {
		if served == mem.Pages() {
			b.StopTimer()
			touch.Value()
			p.Madvise(mem.Range, unix.MADV_DONTNEED).Value()
			touch, served = p.Touch(mem), 0
			b.StartTimer()
		}
		n, err := f.ReadMsgs(msgs)
		if err != nil {
			b.Fatal(err)
		}
		for _, m := range msgs[:n] {
			fault, _ := m.Pagefault()
			_, err := f.Copy(fault.Addr, src, 0)
			if err == nil {
				served++
			} else if !errors.Is(err, unix.EEXIST) {
				b.Fatal(err)
			}
		}
	}
}

// BenchmarkCopy fills memory that nobody waits for.
func BenchmarkCopy(b *testing.B) {
	for _, size := range []int{pageSize, 64 << 10, 2 << 20} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			f := open(b, nil)
			mem := mmap(b, 64<<20/pageSize)
			r := uffd.RangeOf(mem)
			register(b, f, r, uffd.RegisterMissing)
			src := make([]byte, size)
			for i := range src {
				src[i] = 1
			}
			b.SetBytes(int64(size))
			b.ReportAllocs()
			left := r
			for b.Loop() {
				if left.Len < uint64(size) {
					b.StopTimer()
					unix.Madvise(mem, unix.MADV_DONTNEED)
					left = r
					b.StartTimer()
				}
				if _, err := f.Copy(left.Start, src, 0); err != nil {
					b.Fatal(err)
				}
				left = left.Skip(int64(size))
			}
		})
	}
}
