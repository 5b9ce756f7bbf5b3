package pager_test

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

// A bench is a way to resolve faults, and the memory it is for.
type bench struct {
	name   string
	kind   uffdtest.Kind
	mode   uffd.RegisterMode
	source func(size int) source.Source
	bare   func(f *uffd.File, page uffd.Range, contents []byte) error // the same without pager
}

func lent(size int) source.Source { return source.FromBytes(make([]byte, size)) }

func bareCopy(f *uffd.File, page uffd.Range, contents []byte) error {
	_, err := f.Copy(page.Start, contents, 0)
	return err
}

var benches = []bench{
	{"copy", uffdtest.Anon, uffd.RegisterMissing, lent, bareCopy},
	{"zero", uffdtest.Anon, uffd.RegisterMissing, func(size int) source.Source { return source.Zero(int64(size)) },
		func(f *uffd.File, page uffd.Range, _ []byte) error {
			_, err := f.ZeroPage(page, 0)
			return err
		}},
	{"continue", uffdtest.Shmem, uffd.RegisterMissing | uffd.RegisterMinor, lent,
		func(f *uffd.File, page uffd.Range, _ []byte) error {
			_, err := f.Continue(page, 0)
			return err
		}},
	{"copy-hugetlb", uffdtest.HugetlbPrivate, uffd.RegisterMissing, lent, bareCopy},
	{"write", uffdtest.Anon, uffd.RegisterMissing | uffd.RegisterWP, lent,
		func(f *uffd.File, page uffd.Range, _ []byte) error { return f.WriteProtect(page, 0) }},
}

// BenchmarkFault measures a thread that touches one page after the other: served
// by a pager, and, to compare, by the loop that the package uffd shows.
func BenchmarkFault(b *testing.B) {
	for _, bench := range benches {
		pages := 8192
		if bench.kind.Huge() {
			pages = 16
		}
		for _, server := range []string{"pager", "loop"} {
			b.Run(bench.name+"/"+server, func(b *testing.B) {
				if bench.kind.Huge() {
					uffdtest.LockSettings(b).HugePages(pages)
				}
				b.SetBytes(int64(bench.kind.PageSize()))
				for done := 0; done < b.N; done += pages {
					b.StopTimer()
					bench.round(b, server, min(pages, b.N-done))
				}
			})
		}
	}
}

// round serves n faults of fresh memory.
func (bench bench) round(b *testing.B, server string, n int) {
	proc := uffdtest.Start(b)
	defer proc.Kill()
	mem := proc.Map(bench.kind, n)
	f := proc.Open(nil)
	defer f.Close()
	register(b, f, mem.Range, bench.mode)
	r := region(mem, bench.source(int(mem.Len)))
	writes := bench.mode.Has(uffd.RegisterWP)
	if writes {
		r.BeforeWrite = func(uffd.Range) {}
	}
	if bench.mode.Has(uffd.RegisterMinor) {
		r.Memory = attachMemory(b, proc, mem)
		clear(r.Memory) // the file has all pages: what is left is to map them
	}
	if writes { // there, and protected
		contents := make([]byte, mem.Len)
		if _, err := f.Copy(mem.Start, contents, uffd.CopyWP); err != nil {
			b.Fatal(err)
		}
	}
	if server == "pager" {
		s := attach(b, proc, f, &pager.Pager{FaultAround: 1}, r)
		s.start(b)
		defer s.client.Close()
	} else {
		go bareLoop(f, bench, mem)
	}
	b.StartTimer()
	defer b.StopTimer()
	if writes {
		proc.Fill(mem.Range, 1).Value()
	} else {
		proc.Touch(mem).Value()
	}
}

func bareLoop(f *uffd.File, bench bench, mem uffdtest.Memory) {
	contents := make([]byte, mem.Len)
	size := uint64(bench.kind.PageSize())
	msgs := make([]uffd.Msg, 16)
	for {
		n, err := f.ReadMsgs(msgs)
		if err != nil {
			return
		}
		for i := range msgs[:n] {
			if fault, ok := msgs[i].Pagefault(); ok {
				off := uint64(fault.Addr-mem.Start) &^ (size - 1)
				page := uffd.Range{Start: mem.Start + uffd.Addr(off), Len: size}
				if err := bench.bare(f, page, contents[off:][:size]); err != nil {
					f.Wake(page)
				}
			}
		}
	}
}

// BenchmarkClients measures several clients of one pager, and several threads of
// one client.
func BenchmarkClients(b *testing.B) {
	const pages = 512
	for _, n := range []int{1, 4, 64} {
		b.Run(fmt.Sprintf("clients=%d", n), func(b *testing.B) {
			b.StopTimer()
			contents := lent(pages * pageSize)
			for done := 0; done < b.N; done += n * pages {
				var p pager.Pager
				p.FaultAround = 1
				var start []func() *uffdtest.Call
				var stop []func()
				for range n {
					proc := uffdtest.Start(b)
					mem, f := mapped(b, proc, uffdtest.Anon, pages)
					c, err := p.Attach(f, region(mem, contents))
					if err != nil {
						b.Fatal(err)
					}
					go c.Serve(context.Background())
					start = append(start, func() *uffdtest.Call { return proc.Touch(mem) })
					stop = append(stop, func() { c.Close(); f.Close(); proc.Kill() })
				}
				b.StartTimer()
				inParallel(start)
				b.StopTimer()
				for _, stop := range stop {
					stop()
				}
			}
		})
	}
	for _, n := range []int{4, 16} {
		b.Run(fmt.Sprintf("threads=%d", n), func(b *testing.B) {
			b.StopTimer()
			for done := 0; done < b.N; done += n * pages {
				proc := uffdtest.Start(b)
				mem, f := mapped(b, proc, uffdtest.Anon, n*pages)
				s := serve(b, proc, f, &pager.Pager{FaultAround: 1}, region(mem, lent(int(mem.Len))))
				var start []func() *uffdtest.Call
				for i := range n {
					part := mem
					part.Start, part.Len = mem.Page(i*pages).Start, uint64(pages*pageSize)
					start = append(start, func() *uffdtest.Call { return proc.Touch(part) })
				}
				b.StartTimer()
				inParallel(start)
				b.StopTimer()
				s.client.Close()
				f.Close()
				proc.Kill()
			}
		})
	}
}

func inParallel(start []func() *uffdtest.Call) {
	var all sync.WaitGroup
	for _, start := range start {
		call := start()
		all.Go(func() { call.Value() })
	}
	all.Wait()
}
