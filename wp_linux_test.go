package uffd_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

const wpFault = uffd.PagefaultWrite | uffd.PagefaultWP

// marked returns the pages that pagemap shows as protected.
func marked(p *uffdtest.Process, mem uffdtest.Memory) (pages []int) {
	for i := range mem.Pages() {
		if p.Pagemap(mem.Page(i).Start)&uffdtest.PagemapUffd != 0 {
			pages = append(pages, i)
		}
	}
	return pages
}

func wantMarked(t testing.TB, p *uffdtest.Process, mem uffdtest.Memory, when string, want ...int) {
	t.Helper()
	got := marked(p, mem)
	same := len(got) == len(want)
	for i := 0; same && i < len(got); i++ {
		same = got[i] == want[i]
	}
	if !same {
		t.Errorf("%s: pages %v are marked as protected, want %v", when, got, want)
	}
}

func TestWriteProtect(t *testing.T) {
	eachKind(t, uffdtest.Kinds, 3, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		requireWP(t, mem.Kind)
		f := p.Open(nil)
		p.Fill(mem.Range, 1).Value()
		register(t, f, mem.Range, uffd.RegisterWP)
		p.Store(mem.Page(0).Start, 1).Value() // not protected yet
		protect(t, f, mem.Range, uffd.WriteProtectWP)
		if bad := p.Check(mem.Range, 1).Value(); bad != 0 {
			t.Errorf("%d bytes differ", bad)
		}
		store := p.Store(mem.Page(1).Start+1, 2)
		nextFault(t, f, mem.Page(1), wpFault)
		protect(t, f, mem.Page(1), uffd.WriteProtectDontWake)
		if n := waiting(t, f); n != 1 {
			t.Errorf("%d threads wait after DontWake, want 1", n)
		}
		if err := f.Wake(mem.Page(1)); err != nil {
			t.Fatal(err)
		}
		store.Value()

		store = p.Store(mem.Page(2).Start, 3)
		nextFault(t, f, mem.Page(2), wpFault)
		protect(t, f, mem.Range, 0)
		store.Value()
		p.Fill(mem.Range, 4).Value()
		quiet(t, f)

		both := uffd.WriteProtectWP | uffd.WriteProtectDontWake
		if err := f.WriteProtect(mem.Range, both); !errors.Is(err, unix.EINVAL) {
			t.Errorf("WriteProtect(%v): %v", both, err)
		}
	})
}

// TestCopyWP installs pages protected from the start.
func TestCopyWP(t *testing.T) {
	eachKind(t, uffdtest.Kinds, 2, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		requireWP(t, mem.Kind)
		f := p.Open(nil)
		register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterWP)
		for i, mode := range []uffd.CopyMode{uffd.CopyWP, 0} {
			load := p.Load(mem.Page(i).Start)
			nextFault(t, f, mem.Page(i), 0)
			fill(t, f, mem.Kind, mem.Page(i), 5, mode)
			load.Value()
		}
		store := p.Store(mem.Page(0).Start, 6)
		nextFault(t, f, mem.Page(0), wpFault)
		protect(t, f, mem.Page(0), 0)
		store.Value()
		p.Store(mem.Page(1).Start, 6).Value()
		quiet(t, f)
		if err := f.Unregister(mem.Range); err != nil {
			t.Fatal(err)
		}
		register(t, f, mem.Range, uffd.RegisterMissing)
		n, err := f.Copy(mem.Page(0).Start, page(mem.Kind, 0), uffd.CopyWP)
		wantErr(t, "CopyWP without RegisterWP", n, err, unix.EINVAL)
	})
}

func TestWPFork(t *testing.T) { testWPFork(t, 0) }

func TestWPForkWithEvent(t *testing.T) {
	uffdtest.RequireEventFork(t)
	testWPFork(t, uffd.FeatureEventFork)
}

func testWPFork(t *testing.T, event uffd.Features) {
	uffdtest.RequireKernel(t, 5, 14, "protection in pagemap")
	eachKind(t, uffdtest.Kinds, 2, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		requireWP(t, mem.Kind)
		if mem.Kind == uffdtest.HugetlbPrivate {
			uffdtest.ForkedWPHugetlb.Avoid(t)
		}
		f := p.Open(&uffd.Config{Require: event})
		p.Fill(mem.Range, 1).Value()
		register(t, f, mem.Range, uffd.RegisterWP)
		wantMarked(t, p, mem, "registered")
		protect(t, f, mem.Page(1), uffd.WriteProtectWP)
		wantMarked(t, p, mem, "protected", 1)

		forked := p.Fork(
			uffdtest.Step{Op: uffdtest.StepPagemap, Args: [6]uint64{uint64(mem.Page(0).Start)}},
			uffdtest.Step{Op: uffdtest.StepPagemap, Args: [6]uint64{uint64(mem.Page(1).Start)}},
			uffdtest.Step{Op: uffdtest.StepStore, Args: [6]uint64{uint64(mem.Page(1).Start), 9}})
		var want uint64
		if event != 0 {
			want = uffdtest.PagemapUffd
			c := child(t, f)
			nextFault(t, c, mem.Page(1), wpFault)
			protect(t, c, mem.Page(1), 0)
		}
		v := forked.Values()
		if v[1]&uffdtest.PagemapUffd != 0 || v[2]&uffdtest.PagemapUffd != want {
			t.Errorf("the child's pagemap is %#x, %#x; want the mark %#x on the second", v[1], v[2], want)
		}
		quiet(t, f)

		wantMarked(t, p, mem, "after the fork", 1)
		if !mem.Kind.Huge() { // which cannot
			p.Madvise(mem.Range, unix.MADV_PAGEOUT).Value() // to swap, if there is any
			wantMarked(t, p, mem, "after PAGEOUT", 1)
		}
		if mem.Kind == uffdtest.Shmem {
			p.Madvise(mem.Range, unix.MADV_DONTNEED).Value()
			wantMarked(t, p, mem, "after DONTNEED", 1)
		}
		protect(t, f, mem.Range, 0)
		wantMarked(t, p, mem, "unprotected")
		p.Store(mem.Page(1).Start, 2).Value()
		wantMarked(t, p, mem, "written")
	})
}

func TestWPUnpopulated(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureWPUnpopulated)
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 3)
	f := p.Open(&uffd.Config{Require: uffd.FeatureWPUnpopulated})
	register(t, f, mem.Range, uffd.RegisterWP)

	protect(t, f, mem.Range, uffd.WriteProtectWP)
	wantMarked(t, p, mem, "protected", 0, 1, 2)
	protect(t, f, mem.Range, 0)
	wantMarked(t, p, mem, "unprotected")

	protect(t, f, mem.Range, uffd.WriteProtectWP)
	p.Madvise(mem.Range, unix.MADV_DONTNEED).Value()
	wantMarked(t, p, mem, "discarded")
	p.Store(mem.Page(0).Start, 1).Value()
	wantMarked(t, p, mem, "written")

	protect(t, f, mem.Range, uffd.WriteProtectWP)
	if b := p.Load(mem.Page(1).Start).Value(); b != 0 {
		t.Errorf("loaded %d through the mark, want 0", b)
	}
	wantMarked(t, p, mem, "read through the mark", 0, 1, 2)
	for i := range mem.Pages() { // present, read, empty
		store := p.Store(mem.Page(i).Start, 2)
		nextFault(t, f, mem.Page(i), wpFault)
		protect(t, f, mem.Page(i), 0)
		store.Value()
	}
	quiet(t, f)
}

// TestWPWithoutUnpopulated has the first write to a page go unnoticed.
func TestWPWithoutUnpopulated(t *testing.T) {
	uffdtest.RequireKernel(t, 5, 14, "protection in pagemap")
	uffdtest.Require(t, uffd.FeaturePagefaultFlagWP)
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 2)
	f := p.Open(nil)
	p.Fill(mem.Page(0), 1).Value()
	register(t, f, mem.Range, uffd.RegisterWP)
	protect(t, f, mem.Range, uffd.WriteProtectWP)
	wantMarked(t, p, mem, "protected", 0)
	p.Store(mem.Page(1).Start, 1).Value()
	quiet(t, f)
}

// TestWPMarkers installs pages where the mark of a protection is.
func TestWPMarkers(t *testing.T) {
	want := uffd.FeatureWPUnpopulated | uffd.FeatureWPHugetlbfsShmem
	uffdtest.Require(t, want)
	eachKind(t, uffdtest.Kinds, 4, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		f := p.Open(&uffd.Config{Require: want})
		register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterWP)
		protect(t, f, mem.Range, uffd.WriteProtectWP)
		wantMarked(t, p, mem, "protected", 0, 1, 2, 3)

		store := p.Store(mem.Page(0).Start, 2)
		nextFault(t, f, mem.Page(0), uffd.PagefaultWrite) // missing comes before protected
		fill(t, f, mem.Kind, mem.Page(0), 1, uffd.CopyWP)
		nextFault(t, f, mem.Page(0), wpFault)
		protect(t, f, mem.Page(0), 0)
		store.Value()

		fill(t, f, mem.Kind, mem.Page(1), 1, 0)
		wantMarked(t, p, mem, "copied without CopyWP", 2, 3)
		p.Store(mem.Page(1).Start, 2).Value()

		if !mem.Kind.Huge() {
			n, err := f.ZeroPage(mem.Page(2), 0)
			if mem.Kind == uffdtest.Shmem {
				if n != int64(mem.Kind.PageSize()) || err != nil {
					t.Errorf("ZeroPage over a mark = %d, %v", n, err)
				}
			} else {
				wantErr(t, "ZeroPage over a mark", n, err, unix.EEXIST)
			}
		}
		quiet(t, f)
	})
}

// TestWPRange protects several mappings in one call.
func TestWPRange(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureWPUnpopulated) // of the same kernel, Linux 6.4
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 6)
	f := p.Open(nil)
	p.Fill(mem.Range, 1).Value()
	register(t, f, mem.Range, uffd.RegisterWP)
	p.Mprotect(mem.Page(1), unix.PROT_READ).Value()
	p.Munmap(mem.Page(3)).Value()
	protect(t, f, mem.Range, uffd.WriteProtectWP)
	wantMarked(t, p, mem, "protected, with a hole", 0, 1, 2, 4, 5)
	protect(t, f, mem.Range, 0)

	if err := f.Unregister(mem.Page(4)); err != nil {
		t.Fatal(err)
	}
	if err := f.WriteProtect(mem.Range, uffd.WriteProtectWP); !errors.Is(err, unix.ENOENT) {
		t.Errorf("WriteProtect of memory that is partly not registered: %v", err)
	}
	wantMarked(t, p, mem, "protected up to page 4", 0, 1, 2)
}

// TestWPAsync has the kernel resolve the faults.
func TestWPAsync(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureWPAsync)
	eachKind(t, uffdtest.Kinds, 3, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		f := p.Open(&uffd.Config{Require: uffd.FeatureWPAsync})
		if want := uffd.FeatureWPAsync | uffd.FeatureWPUnpopulated; f.Features() != want {
			t.Errorf("Features = %v, want %v", f.Features(), want)
		}
		register(t, f, mem.Range, uffd.RegisterWP)
		p.Fill(mem.Page(0), 1).Value()
		protect(t, f, mem.Range, uffd.WriteProtectWP)
		wantMarked(t, p, mem, "protected", 0, 1, 2)
		p.Store(mem.Page(0).Start, 2).Value()
		p.Store(mem.Page(2).Start, 2).Value()
		wantMarked(t, p, mem, "two written", 1)
		quiet(t, f)
	})
}

// TestWPMremap moves protected memory of every size of folio, without the event:
// it is not protected any more.
func TestWPMremap(t *testing.T) {
	uffdtest.Require(t, uffd.FeaturePagefaultFlagWP|uffd.FeatureWPHugetlbfsShmem)
	uffdtest.RequireKernel(t, 6, 12, "mremap that clears the protection")
	move := func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		t.Helper()
		f := p.Open(nil)
		p.Fill(mem.Range, 1).Value()
		register(t, f, mem.Range, uffd.RegisterWP)
		protect(t, f, mem.Range, uffd.WriteProtectWP)
		if n := len(marked(p, mem)); n != mem.Pages() {
			t.Errorf("%d pages of %d are protected", n, mem.Pages())
		}
		to := mem
		to.Start = reserve(p, uffdtest.Anon, mem.Len+uint64(mem.Kind.PageSize()))
		if mem.Kind.Huge() {
			to.Start = reserve(p, mem.Kind, mem.Len)
		}
		p.Mremap(mem.Range, mem.Len, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, to.Start).Value()
		wantMarked(t, p, to, "moved")
		if bad := p.Check(to.Range, 1).Value(); bad != 0 {
			t.Errorf("%d bytes differ", bad)
		}
		p.Fill(to.Range, 2).Value()
		quiet(t, f)
	}
	eachKind(t, uffdtest.Kinds, 2, move)

	const all = "/sys/kernel/mm/transparent_hugepage/"
	sizes, err := filepath.Glob(all + "hugepages-*kB")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range sizes {
		name := strings.TrimPrefix(filepath.Base(dir), "hugepages-")
		if testing.Short() && name != "64kB" {
			continue
		}
		t.Run("thp-"+name, func(t *testing.T) {
			thp := uffdtest.RequireTHP(t)
			settings := uffdtest.LockSettings(t)
			settings.Set(all+"enabled", "madvise") // sizes that follow it are off
			kinds := map[uffdtest.Kind][2]string{
				uffdtest.Anon:  {"enabled", "stats/anon_fault_alloc"},
				uffdtest.Shmem: {"shmem_enabled", "stats/shmem_alloc"},
			}
			flags := map[uffdtest.Kind]int{uffdtest.Anon: unix.MAP_PRIVATE, uffdtest.Shmem: unix.MAP_SHARED}
			tried := 0
			for kind, files := range kinds {
				if _, err := os.Stat(filepath.Join(dir, files[0])); err != nil {
					continue // there are no such folios
				}
				tried++
				t.Run(kind.String(), func(t *testing.T) {
					settings.Set(filepath.Join(dir, files[0]), "always")
					folios := func() (n int) {
						text, err := os.ReadFile(filepath.Join(dir, files[1]))
						if err == nil {
							_, err = fmt.Sscan(string(text), &n)
						}
						if err != nil {
							t.Fatal(err)
						}
						return n
					}
					before := folios()
					p := uffdtest.Start(t)
					mem := uffdtest.Memory{Range: uffd.Range{Len: 2 * thp}, Kind: kind, FD: -1}
					mem.Start = p.Mmap(0, mem.Len, unix.PROT_READ|unix.PROT_WRITE, flags[kind]|unix.MAP_ANONYMOUS, -1)
					move(t, p, mem)
					if folios() == before {
						t.Errorf("the memory is not made of folios of %s", name)
					}
				})
			}
			if tried == 0 {
				t.Errorf("%s has none of %v", dir, kinds)
			}
		})
	}
}
