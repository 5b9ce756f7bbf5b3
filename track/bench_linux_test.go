package track

import (
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

// benchPages is 1 GiB of small pages.
var benchPages = 1 << 30 / os.Getpagesize()

// dirty are the parts of all pages that are written before each collection, in
// thousandths.
var dirty = []int{1, 100, 1000}

// BenchmarkCollect collects 1 GiB of which some pages, chosen at random, are
// written: on a busy machine cpu-ns/op, the time on the processor, says more.
// The memory is that of the process itself: if other threads of it run, their
// processors have to be told of each page that is protected. The nested module
// bench measures the memory of another process, side by side with C.
func BenchmarkCollect(b *testing.B) {
	uffdtest.Require(b, uffd.FeatureWPAsync)
	m := anonymous(b, benchPages)
	m.write(0, m.pages())
	f, err := Open()
	if err != nil {
		b.Fatal(err)
	}
	w := startWrites(b, f, 0, m.r())
	order := rand.New(rand.NewPCG(1, 1)).Perm(m.pages())
	for _, part := range dirty {
		b.Run(fmt.Sprintf("%.1f%%", float64(part)/10), func(b *testing.B) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			order := order[:m.pages()*part/1000]
			collect(b, w)
			b.ReportAllocs()
			var cpu int64
			for b.Loop() {
				b.StopTimer()
				for _, i := range order {
					m.bytes[i*m.page]++
				}
				before := cpuTime(b)
				b.StartTimer()
				var pages uint64
				for r, err := range w.Collect() {
					if err != nil {
						b.Fatal(err)
					}
					pages += r.Len / uint64(m.page)
				}
				b.StopTimer()
				cpu += cpuTime(b) - before
				b.StartTimer()
				if pages != uint64(len(order)) {
					b.Fatalf("%d pages are written, want %d", pages, len(order))
				}
			}
			b.ReportMetric(float64(cpu)/float64(b.N), "cpu-ns/op")
		})
	}
}

// cpuTime is how long the thread has been on a processor.
func cpuTime(b *testing.B) int64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		b.Fatal(err)
	}
	return t.Nano()
}

// BenchmarkStart protects 1 GiB that exists.
func BenchmarkStart(b *testing.B) {
	uffdtest.Require(b, uffd.FeatureWPAsync)
	m := anonymous(b, benchPages)
	m.write(0, m.pages())
	for b.Loop() {
		b.StopTimer()
		f, err := Open()
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		w, err := Start(f, 0, m.r())
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := w.Stop(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkFirstWrite writes to pages for the first time after they were
// collected.
func BenchmarkFirstWrite(b *testing.B) {
	b.Run("untracked", func(b *testing.B) {
		m := anonymous(b, 1<<14)
		m.write(0, m.pages())
		i := 0
		for b.Loop() {
			m.bytes[i%m.pages()*m.page]++
			i++
		}
	})
	b.Run("async", func(b *testing.B) {
		uffdtest.Require(b, uffd.FeatureWPAsync)
		m := anonymous(b, 1<<14)
		m.write(0, m.pages())
		f, err := Open()
		if err != nil {
			b.Fatal(err)
		}
		w := startWrites(b, f, 0, m.r())
		i := 0
		for b.Loop() {
			if i == m.pages() {
				b.StopTimer()
				collect(b, w)
				i = 0
				b.StartTimer()
			}
			m.bytes[i*m.page]++
			i++
		}
	})
	b.Run("sync", func(b *testing.B) {
		uffdtest.Require(b, uffd.FeaturePagefaultFlagWP)
		p := uffdtest.Start(b)
		mem := p.Map(uffdtest.Anon, 1<<14)
		p.Fill(mem.Range, 1).Value()
		w := startWrites(b, openIn(p, Sync), p.Pid, mem.Range)
		// One call is a write to each page.
		for b.Loop() {
			p.Run("write-each", uint64(mem.Start), uint64(mem.Pages()), uint64(os.Getpagesize())).Value()
			b.StopTimer()
			collect(b, w)
			b.StartTimer()
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*mem.Pages()), "ns/page")
	})
}

var _ = uffdtest.Handle("write-each", func(args []uint64) ([]uint64, error) {
	mem := uffdtest.BytesAt(args[0], args[1]*args[2])
	for i := uint64(0); i < uint64(len(mem)); i += args[2] {
		mem[i]++
	}
	return nil, nil
})
