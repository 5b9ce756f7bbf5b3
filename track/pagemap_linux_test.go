package track

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

// A memory is memory of the test process, in pages of some size. It can be
// protected with FeatureWPAsync only: nobody answers faults.
type memory struct {
	bytes []byte
	page  int
}

func (m memory) r() uffd.Range { return uffd.RangeOf(m.bytes) }
func (m memory) pages() int    { return len(m.bytes) / m.page }

// span returns pages from up to, but not including, to.
func (m memory) span(from, to int) uffd.Range {
	return uffd.Range{Start: m.r().Start + uffd.Addr(from*m.page), Len: uint64((to - from) * m.page)}
}

// write writes to pages from up to, but not including, to.
func (m memory) write(from, to int) {
	for i := from; i < to; i++ {
		m.bytes[i*m.page+i%m.page]++
	}
}

func mapMemory(t testing.TB, n, page, prot, flags, fd int) memory {
	t.Helper()
	b, err := unix.Mmap(fd, 0, n*page, prot, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return memory{b, page}
}

const readWrite = unix.PROT_READ | unix.PROT_WRITE

func anonymous(t testing.TB, n int) memory {
	t.Helper()
	return mapMemory(t, n, os.Getpagesize(), readWrite, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, -1)
}

// hugePages returns n transparent huge pages that exist, as a memory of small
// pages.
func hugePages(t testing.TB, n int) memory {
	t.Helper()
	size := int(uffdtest.RequireTHP(t))
	m := anonymous(t, (n+1)*size/os.Getpagesize())
	skip := -int(uintptr(unsafe.Pointer(&m.bytes[0]))) & (size - 1)
	m.bytes = m.bytes[skip:][:n*size]
	if err := unix.Madvise(m.bytes, unix.MADV_HUGEPAGE); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		m.bytes[i*size] = 1 // to read first may map the huge page of zeros, which some kernels split
	}
	p := pagemap(t)
	for r, err := range p.Regions(Scan{Range: m.r(), Return: PageHuge}) {
		if err != nil || r.Range() != m.r() || r.Categories != PageHuge {
			t.Fatalf("the memory is not of huge pages: %v, %v", r, err)
		}
	}
	return m
}

func pagemap(t testing.TB) *Pagemap {
	t.Helper()
	p, err := OpenPagemap(0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// protected opens a userfaultfd and protects memory with it.
func protected(t testing.TB, memories ...memory) *uffd.File {
	t.Helper()
	f, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	for _, m := range memories {
		if _, err := f.Register(m.r(), uffd.RegisterWP); err != nil {
			t.Fatal(err)
		}
		if err := f.WriteProtect(m.r(), uffd.WriteProtectWP); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// join makes one of ranges that touch.
func join(ranges []uffd.Range) (joined []uffd.Range) {
	for _, r := range ranges {
		if last := len(joined) - 1; last >= 0 && joined[last].End() == r.Start {
			joined[last].Len += r.Len
		} else {
			joined = append(joined, r)
		}
	}
	return joined
}

func selected(t testing.TB, p *Pagemap, s Scan) (ranges []uffd.Range) {
	t.Helper()
	for r, err := range p.Regions(s) {
		if err != nil {
			t.Fatal(err)
		}
		if r.Categories&^s.Return != 0 || r.Start >= r.End {
			t.Errorf("region %+v of a scan that returns %v", r, s.Return)
		}
		ranges = append(ranges, r.Range())
	}
	return join(ranges)
}

func wantWritten(t testing.TB, p *Pagemap, m memory, when string, want ...uffd.Range) {
	t.Helper()
	if got := selected(t, p, Scan{Range: m.r(), Mask: PageWritten, Return: PageWritten}); !slices.Equal(got, want) {
		t.Errorf("%s: %v are written, want %v", when, got, want)
	}
}

// reset is a scan that protects what is written. regions limits the steps.
func reset(t testing.TB, p *Pagemap, r uffd.Range, regions int, max uint64) (ranges []uffd.Range) {
	t.Helper()
	buf := make([]Region, regions)
	for r.Len > 0 {
		n, next, err := p.Scan(&Scan{Range: r, Mask: PageWritten, Return: PageWritten, MaxPages: max, Protect: true, CheckAsync: true}, buf)
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range buf[:n] {
			ranges = append(ranges, found.Range())
		}
		r = r.Skip(int64(next - r.Start))
	}
	return join(ranges)
}

func wantReset(t testing.TB, p *Pagemap, r uffd.Range, regions int, max uint64, when string, want ...uffd.Range) {
	t.Helper()
	if got := reset(t, p, r, regions, max); !slices.Equal(got, want) {
		t.Errorf("%s: %v are written, want %v", when, got, want)
	}
}

func TestScanArguments(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureWPAsync)
	m := anonymous(t, 8)
	protected(t, m)
	p := pagemap(t)
	m.write(2, 4)
	all := Scan{Range: m.r(), Mask: PageWritten, Return: PageWritten}
	with := func(change func(*Scan)) Scan {
		s := all
		change(&s)
		return s
	}
	for _, c := range []struct {
		name    string
		scan    Scan
		regions int
		n       int
		err     error
	}{
		{"everything", all, 8, 1, nil},
		{"zero range", with(func(s *Scan) { s.Range.Len = 0 }), 8, 0, nil},
		{"no regions", all, 0, 0, nil},
		{"empty masks", Scan{Range: m.r()}, 8, 1, nil},
		{"end rounded up", with(func(s *Scan) { s.Range.Len = uint64(2*m.page + 1) }), 8, 1, nil},
		{"start not on a page", with(func(s *Scan) { s.Range.Start++ }), 8, 0, unix.EINVAL},
		{"end before start", with(func(s *Scan) { s.Range.Len = -s.Range.Len }), 8, 0, unix.EINVAL},
		{"outside of user space", with(func(s *Scan) { s.Range = uffd.Range{Start: 0xffff_8000_0000_0000, Len: 1 << 16} }), 8, 0, unix.EFAULT},
		{"unknown category in Mask", with(func(s *Scan) { s.Mask |= 1 << 63 }), 8, 0, unix.EINVAL},
		{"unknown category in AnyOf", with(func(s *Scan) { s.AnyOf |= 1 << 63 }), 8, 0, unix.EINVAL},
		{"unknown category in Inverted", with(func(s *Scan) { s.Inverted |= 1 << 63 }), 8, 0, unix.EINVAL},
		{"unknown category in Return", with(func(s *Scan) { s.Return |= 1 << 63 }), 8, 0, unix.EINVAL},
		{"protect without regions", with(func(s *Scan) { s.Protect = true }), 0, 0, unix.EINVAL},
		{"check", with(func(s *Scan) { s.CheckAsync = true }), 8, 1, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			n, next, err := p.Scan(&c.scan, make([]Region, c.regions))
			want := uffd.Addr((uint64(c.scan.Range.End()) + uint64(m.page-1)) &^ uint64(m.page-1))
			if c.err != nil {
				want = c.scan.Range.Start
			}
			if n != c.n || next != want || !errors.Is(err, c.err) {
				t.Errorf("Scan = %d, %v, %v; want %d, %v, %v", n, next, err, c.n, want, c.err)
			}
		})
	}
	wantWritten(t, p, m, "after scans that protect nothing", m.span(2, 4))
	for _, c := range []Categories{0, PageWritten, PageWPAllowed | PageHuge, PageSoftDirty} {
		if !p.Supports(c) {
			t.Errorf("Supports(%v) = false", c)
		}
	}
	if p.Supports(1 << 63) {
		t.Error("Supports(1<<63)")
	}
	if features, err := uffd.Probe(); err != nil || p.Supports(PageAccessed) != features.Has(uffd.FeatureRWP) {
		t.Errorf("Supports(%v) = %v, the kernel offers %v (%v)", PageAccessed, p.Supports(PageAccessed), features, err)
	}
	p.Close()
	if _, _, err := p.Scan(&all, nil); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Scan after Close: %v", err)
	}
}

// TestScanKernelArguments asks the kernel for what a Scan cannot.
func TestScanKernelArguments(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureWPAsync)
	m := anonymous(t, 1)
	m.write(0, 1)
	protected(t, m)
	p := pagemap(t)
	var regions [1]Region
	for _, c := range []struct {
		name   string
		change func(a *pmScanArg)
		n      uintptr
		want   unix.Errno
	}{
		{"as it is", func(a *pmScanArg) {}, 1, 0},
		{"no regions with a length", func(a *pmScanArg) { a.vec = nil }, 0, unix.EINVAL},
		{"no regions without one", func(a *pmScanArg) { a.vec, a.vecLen = nil, 0 }, 0, 0},
		{"unknown flag", func(a *pmScanArg) { a.flags = 1 << 63 }, 0, unix.EINVAL},
		{"next flag", func(a *pmScanArg) { a.flags = (scanWPMatching | scanCheckWPAsync) + 1 }, 0, unix.EINVAL},
		{"other size", func(a *pmScanArg) { a.size-- }, 0, unix.EINVAL},
	} {
		arg := pmScanArg{
			size:     uint64(unsafe.Sizeof(pmScanArg{})),
			start:    uint64(m.r().Start),
			end:      uint64(m.r().End()),
			vec:      unsafe.Pointer(&regions),
			vecLen:   uint64(len(regions)),
			returned: uint64(PagePresent),
		}
		c.change(&arg)
		n, _, e := unix.Syscall(unix.SYS_IOCTL, p.file.Fd(), uintptr(reqPagemapScan), uintptr(unsafe.Pointer(&arg)))
		if e != c.want || e == 0 && n != c.n {
			t.Errorf("%s: %d, %v; want %d, %v", c.name, n, e, c.n, c.want)
		}
	}
}

// TestScanAvailable wants PAGEMAP_SCAN, or a clear error on kernels without it.
func TestScanAvailable(t *testing.T) {
	major, minor := uffdtest.Kernel()
	available := major > 6 || major == 6 && minor >= 7
	p := pagemap(t)
	_, _, err := p.Scan(&Scan{}, nil)
	if available && err != nil || !available && !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("Scan on Linux %d.%d: %v", major, minor, err)
	}
	for _, err := range p.Regions(Scan{}) {
		if !available && !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("Regions on Linux %d.%d: %v", major, minor, err)
		}
	}
	if got := p.Supports(PageWritten); got != available {
		t.Errorf("Supports on Linux %d.%d = %v", major, minor, got)
	}
}

func TestOpenPagemap(t *testing.T) {
	if _, err := OpenPagemap(-1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("OpenPagemap(-1): %v", err)
	}
	process := uffdtest.Start(t)
	p, err := OpenPagemap(process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if p.Gone() {
		t.Error("gone while the process lives")
	}
	process.Kill()
	if !p.Gone() {
		t.Error("not gone after the process")
	}
}

// memories are the kinds of memory that the kernel's own test scans.
var memories = []struct {
	name string
	get  func(t *testing.T) memory
}{
	{"small", func(t *testing.T) memory { return anonymous(t, 10) }},
	{"large", func(t *testing.T) memory { return anonymous(t, 5120) }},
	{"thp", func(t *testing.T) memory { return hugePages(t, 2) }},
	{"hugetlb", func(t *testing.T) memory {
		uffdtest.LockSettings(t).HugePages(4)
		return mapMemory(t, 4, uffdtest.HugePageSize(), readWrite, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_HUGETLB, -1)
	}},
	{"hugetlb-memfd", func(t *testing.T) memory {
		uffdtest.LockSettings(t).HugePages(4)
		return memfd(t, 4, uffdtest.HugePageSize(), unix.MFD_HUGETLB, unix.MAP_SHARED)
	}},
	{"file-private", func(t *testing.T) memory {
		f, err := os.Create(filepath.Join(t.TempDir(), "file"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Truncate(int64(10 * os.Getpagesize())); err != nil {
			t.Fatal(err)
		}
		return mapMemory(t, 10, os.Getpagesize(), readWrite, unix.MAP_PRIVATE, int(f.Fd()))
	}},
	{"memfd", func(t *testing.T) memory { return memfd(t, 10, os.Getpagesize(), 0, unix.MAP_SHARED) }},
	{"memfd-private", func(t *testing.T) memory { return memfd(t, 10, os.Getpagesize(), 0, unix.MAP_PRIVATE) }},
}

func memfd(t *testing.T, n, page, flags, mapping int) memory {
	t.Helper()
	fd, err := unix.MemfdCreate("track", unix.MFD_CLOEXEC|flags)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, int64(n*page)); err != nil {
		t.Fatal(err)
	}
	return mapMemory(t, n, page, readWrite, mapping, fd)
}

func TestScanWritten(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureWPAsync)
	for _, kind := range memories {
		t.Run(kind.name, func(t *testing.T) {
			m := kind.get(t)
			f := protected(t, m)
			p := pagemap(t)
			n := m.pages()
			mid := n / 2
			all := m.span(0, n)
			wantWritten(t, p, m, "protected")
			wantReset(t, p, all, 1, 0, "protected")

			m.write(0, n)
			wantWritten(t, p, m, "all", all)
			wantReset(t, p, all, 8, 0, "all", all)
			wantWritten(t, p, m, "all, after the reset")

			m.write(1, n-1)
			wantWritten(t, p, m, "all but the ends", m.span(1, n-1))
			wantReset(t, p, all, 8, 0, "all but the ends", m.span(1, n-1))
			wantReset(t, p, all, 8, 0, "after the reset")

			m.write(mid, mid+1)
			wantReset(t, p, all, 8, 0, "the middle", m.span(mid, mid+1))
			m.write(mid, mid+2)
			wantReset(t, p, m.span(mid, mid+2), 1, 0, "two in the middle", m.span(mid, mid+2))
			wantWritten(t, p, m, "two in the middle, after the reset")
			m.write(0, 1)
			m.write(n-1, n)
			wantReset(t, p, all, 8, 0, "the ends", m.span(0, 1), m.span(n-1, n))
			wantWritten(t, p, m, "the ends, after the reset")

			if err := f.WriteProtect(all, 0); err != nil {
				t.Fatal(err)
			}
			wantWritten(t, p, m, "not protected", all)
			wantReset(t, p, m.span(mid, mid+1), 8, 0, "part", m.span(mid, mid+1))
			wantWritten(t, p, m, "without the middle", m.span(0, mid), m.span(mid+1, n))
		})
	}
}

// TestScanPatterns scans alternating pages in steps of all sizes.
func TestScanPatterns(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureWPAsync)
	const n = 2400 // more regions than the kernel keeps at a time
	m := anonymous(t, n)
	protected(t, m)
	p := pagemap(t)
	var want []uffd.Range
	for i := 0; i < n; i += 2 {
		want = append(want, m.span(i, i+1))
	}
	write := func() {
		for i := 0; i < n; i += 2 {
			m.write(i, i+1)
		}
	}
	write()
	wantWritten(t, p, m, "alternating", want...)
	wantWritten(t, p, m, "alternating, again", want...)
	for _, step := range []struct {
		regions int
		max     uint64
	}{{1, 0}, {2, 0}, {511, 0}, {512, 0}, {513, 0}, {n / 2, 0}, {2 * n, 0}, {2 * n, 1}, {2 * n, 700}, {2 * n, n / 2}, {7, 5}} {
		write()
		when := fmt.Sprintf("%d regions, %d pages", step.regions, step.max)
		wantReset(t, p, m.r(), step.regions, step.max, when, want...)
		wantWritten(t, p, m, when+", after the reset")
	}

	// One step of a few pages leaves the rest.
	write()
	buf := make([]Region, 8)
	found, next, err := p.Scan(&Scan{Range: m.r(), Mask: PageWritten, Return: PageWritten, MaxPages: 3, Protect: true}, buf)
	if found != 3 || err != nil {
		t.Fatalf("Scan = %d, %v, %v; want 3 regions", found, next, err)
	}
	wantWritten(t, p, m, "without three", want[3:]...)
	wantReset(t, p, m.span(0, n/2), 8, 0, "first half", want[3:n/4]...)
	wantReset(t, p, m.r(), 8, 0, "the rest", want[n/4:]...)
}

// TestScanNext wants to go on where the scan stopped.
func TestScanNext(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureWPAsync)
	const n = 1000
	m := anonymous(t, n)
	protected(t, m)
	p := pagemap(t)
	check := func(t *testing.T, what string, regions int, max uint64, found, next int) {
		t.Helper()
		gotFound, gotNext, err := p.Scan(&Scan{Range: m.r(), Mask: PageWritten, Return: PageWritten, MaxPages: max}, make([]Region, regions))
		if want := m.r().Start + uffd.Addr(next*m.page); gotFound != found || gotNext != want || err != nil {
			t.Errorf("%s: Scan with %d regions and %d pages = %d, page %d, %v; want %d, page %d",
				what, regions, max, gotFound, int(gotNext-m.r().Start)/m.page, err, found, next)
		}
	}
	check(t, "clean", 1, 0, 0, n)
	check(t, "clean", 1, 1, 0, n)
	m.write(0, n)
	check(t, "all", 1000, 0, 1, n)
	check(t, "all", 1, 0, 1, n)
	check(t, "all", 1, 1, 1, 1)
	check(t, "all", 1, n/2, 1, n/2)
	check(t, "all", 1, n-1, 1, n-1)
	check(t, "all", 1, n, 1, n)
	reset(t, p, m.r(), 1, 0)
	for i := 0; i < n; i += 2 {
		m.write(i, i+1)
	}
	// It stops at the page that it has no room for, or behind the last of MaxPages.
	check(t, "sparse", n/2, 0, n/2, n)
	check(t, "sparse", n/4, 0, n/4, n/2)
	check(t, "sparse", 1, 0, 1, 2)
	check(t, "sparse", n/2, n/4, n/4, n/2)
	check(t, "sparse", n/2, 1, 1, 2)
	check(t, "sparse", n/2, n/2, n/2, n)
}

func TestScanHugePage(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureWPAsync)
	m := hugePages(t, 1)
	n := m.pages()
	f := protected(t, m)
	p := pagemap(t)
	if got := selected(t, p, Scan{Range: m.r(), Mask: PageHuge, Return: PageHuge}); !slices.Equal(got, []uffd.Range{m.r()}) {
		t.Errorf("protected: %v are huge", got)
	}
	m.write(n/2, n/2+1)
	wantWritten(t, p, m, "one small page", m.span(n/2, n/2+1))

	whole := func() {
		t.Helper()
		if err := f.Unregister(m.r()); err != nil {
			t.Fatal(err)
		}
		if err := unix.Madvise(m.bytes, unix.MADV_DONTNEED); err != nil {
			t.Fatal(err)
		}
		m.bytes[0] = 1
		if _, err := f.Register(m.r(), uffd.RegisterWP); err != nil {
			t.Fatal(err)
		}
	}
	whole()
	wantReset(t, p, m.r(), 1, 0, "whole", m.r())
	wantWritten(t, p, m, "whole, after the reset")
	whole()
	wantReset(t, p, m.span(0, n/2), 1, 0, "half", m.span(0, n/2))
	wantWritten(t, p, m, "the other half", m.span(n/2, n))
	whole()
	found, next, err := p.Scan(&Scan{Range: m.r(), Mask: PageWritten, Return: PageWritten, MaxPages: 3, Protect: true}, make([]Region, 1))
	if found != 1 || next != m.span(3, n).Start || err != nil {
		t.Errorf("Scan of three pages = %d, %v, %v", found, next, err)
	}
	wantWritten(t, p, m, "all but three", m.span(3, n))
	whole()
	wantReset(t, p, m.r(), 1, uint64(n/4), "in quarters", m.r())
	wantWritten(t, p, m, "in quarters, after the reset")
}

// TestScanSelects compares what a scan selects with what the masks say.
func TestScanSelects(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureWPAsync)
	tracked, plain, file := anonymous(t, 40), anonymous(t, 20), memories[5].get(t)
	for _, m := range []memory{tracked, plain} {
		m.write(0, m.pages()/3)
	}
	protected(t, tracked, file)
	p := pagemap(t)
	for _, m := range []memory{tracked, plain, file} {
		m.write(m.pages()/4, m.pages()/2)
		var sink byte
		for i := m.pages() / 2; i < 3*m.pages()/4; i++ {
			sink |= m.bytes[i*m.page]
		}
		if sink != 0 {
			t.Fatal("not zeros")
		}
	}
	all := PageWPAllowed | PageWritten | PageFile | PagePresent | PageSwapped | PagePFNZero | PageHuge | PageSoftDirty
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	seen := make(map[Categories]bool)
	for _, m := range []memory{tracked, plain, file} {
		categories := make([]Categories, m.pages())
		// PageWPAllowed in Inverted, and nowhere else, shows all memory.
		for r, err := range p.Regions(Scan{Range: m.r(), Inverted: PageWPAllowed, Return: all}) {
			if err != nil {
				t.Fatal(err)
			}
			for a := r.Start; a < r.End; a += uffd.Addr(m.page) {
				categories[int(a-m.r().Start)/m.page] = r.Categories
				seen[r.Categories] = true
			}
		}
		for range 500 {
			s := Scan{Range: m.r(), Return: all}
			for _, set := range []*Categories{&s.Inverted, &s.Mask, &s.AnyOf} {
				*set = Categories(random.Uint64()&random.Uint64()) & all
			}
			var want []uffd.Range
			for i, c := range categories {
				x := c ^ s.Inverted
				if x&s.Mask == s.Mask && (s.AnyOf == 0 || x&s.AnyOf != 0) && (s.Inverted.Has(PageWPAllowed) || c.Has(PageWPAllowed)) {
					want = append(want, m.span(i, i+1))
				}
			}
			if got := selected(t, p, s); !slices.Equal(got, join(want)) {
				t.Fatalf("%+v selects %v, want %v", s, got, join(want))
			}
		}
	}
	if len(seen) < 6 {
		t.Errorf("only %d different pages: %v", len(seen), seen)
	}
}

func TestScanOtherMemory(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureWPAsync)
	p := pagemap(t)
	full := Scan{Mask: PageWritten, Return: PageWritten, Protect: true, CheckAsync: true}

	t.Run("not tracked", func(t *testing.T) {
		m := anonymous(t, 4)
		m.write(0, 2)
		wantWritten(t, p, m, "written")
		for _, s := range []Scan{{AnyOf: PageWritten}, {Return: PageWritten}, {Inverted: PageWritten, Mask: PageWritten}} {
			s.Range = m.r()
			if got := selected(t, p, s); len(got) > 0 {
				t.Errorf("%+v selects %v of memory that is not tracked", s, got)
			}
		}
		s := Scan{Range: m.r(), Mask: PageWritten, Return: PageWritten, Protect: true}
		if n, next, err := p.Scan(&s, make([]Region, 4)); n != 0 || next != m.r().End() || err != nil {
			t.Errorf("Scan that protects = %d, %v, %v; want nothing", n, next, err)
		}
		s.Protect, s.CheckAsync = false, true
		if _, _, err := p.Scan(&s, make([]Region, 4)); !errors.Is(err, unix.EPERM) {
			t.Errorf("Scan that checks: %v, want EPERM", err)
		}
	})
	t.Run("failure on the way", func(t *testing.T) {
		m := anonymous(t, 8)
		f := protected(t, m)
		if err := f.Unregister(m.span(6, 8)); err != nil {
			t.Fatal(err)
		}
		m.write(1, 2)
		m.write(3, 4)
		s := full
		s.Range = m.r()
		buf := make([]Region, 8)
		for i := range buf {
			buf[i] = Region{1, 2, 3} // of another scan
		}
		n, next, err := p.Scan(&s, buf)
		if n != 2 || next != m.span(4, 5).Start || !errors.Is(err, unix.EPERM) {
			t.Fatalf("Scan = %d, %v, %v; want the 2 regions before the failure", n, next, err)
		}
		if buf[0].Range() != m.span(1, 2) || buf[1].Range() != m.span(3, 4) {
			t.Errorf("regions %v", buf[:n])
		}
		wantWritten(t, p, m, "what was returned is protected")
	})
	t.Run("not mapped", func(t *testing.T) {
		m := anonymous(t, 5)
		protected(t, m)
		m.write(0, 5)
		if err := unix.MunmapPtr(unsafe.Pointer(&m.bytes[m.page]), uintptr(3*m.page)); err != nil {
			t.Fatal(err)
		}
		wantReset(t, p, m.r(), 4, 0, "with a hole", m.span(0, 1), m.span(4, 5))
		n, next, err := p.Scan(&Scan{Range: m.span(1, 4), Return: PagePresent}, make([]Region, 4))
		if n != 0 || next != m.span(4, 5).Start || err != nil {
			t.Errorf("Scan of nothing = %d, %v, %v", n, next, err)
		}
	})
	t.Run("protections", func(t *testing.T) {
		m := anonymous(t, 9)
		m.write(0, 9)
		protected(t, m)
		m.write(2, 8)
		for i, prot := range []int{unix.PROT_READ, unix.PROT_NONE} {
			if err := unix.Mprotect(m.bytes[(3+2*i)*m.page:][:2*m.page], prot); err != nil {
				t.Fatal(err)
			}
		}
		wantReset(t, p, m.r(), 8, 0, "mixed", m.span(2, 8))
		wantWritten(t, p, m, "mixed, after the reset")
	})
	t.Run("zero pages", func(t *testing.T) {
		m := anonymous(t, 4)
		if m.bytes[0]|m.bytes[m.page] != 0 {
			t.Fatal("not zeros")
		}
		protected(t, m)
		// Not every kernel maps the page of zeros where memory is read.
		got := selected(t, p, Scan{Range: m.r(), Mask: PagePFNZero, Return: PagePFNZero})
		if len(got) > 0 && !slices.Equal(got, []uffd.Range{m.span(0, 2)}) {
			t.Errorf("%v are zero pages, want none or both that were read", got)
		}
		wantWritten(t, p, m, "protected")
		m.write(1, 3)
		wantReset(t, p, m.r(), 8, 0, "written", m.span(1, 3))
	})
	t.Run("discarded", func(t *testing.T) {
		m := anonymous(t, 4)
		m.write(0, 4)
		protected(t, m)
		if err := unix.Madvise(m.bytes[m.page:][:2*m.page], unix.MADV_DONTNEED); err != nil {
			t.Fatal(err)
		}
		// Whether such pages are written is said alike only by scans that protect.
		s := Scan{Range: m.r(), Inverted: PagePresent, Mask: PagePresent, Return: PagePresent}
		if got := selected(t, p, s); !slices.Equal(got, []uffd.Range{m.span(1, 3)}) {
			t.Errorf("%v are discarded, want two", got)
		}
		wantReset(t, p, m.r(), 8, 0, "discarded", m.span(1, 3))
		wantWritten(t, p, m, "discarded, after the reset")
		m.write(2, 3)
		wantReset(t, p, m.r(), 8, 0, "written then", m.span(2, 3))
	})
	t.Run("system calls", func(t *testing.T) {
		m := anonymous(t, 4)
		m.write(0, 4)
		protected(t, m)
		file, err := os.Create(filepath.Join(t.TempDir(), "file"))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if _, err := file.Write(m.bytes[:2*m.page]); err != nil {
			t.Fatal(err)
		}
		wantWritten(t, p, m, "as the source of a system call")
		if _, err := file.ReadAt(m.bytes[m.page:][:2*m.page], 0); err != nil {
			t.Fatal(err)
		}
		wantReset(t, p, m.r(), 8, 0, "as its destination", m.span(1, 3))
	})
}

// TestScanAccessed finds what was used, of memory that is protected from access.
func TestScanAccessed(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureRWPAsync)
	m := anonymous(t, 8)
	m.write(0, 8)
	f, err := uffd.New(&uffd.Config{Require: uffd.FeatureRWP | uffd.FeatureRWPAsync})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Register(m.r(), uffd.RegisterRWP); err != nil {
		t.Fatal(err)
	}
	if err := f.RWProtect(m.r(), uffd.RWProtectRWP); err != nil {
		t.Fatal(err)
	}
	p := pagemap(t)
	s := Scan{Range: m.r(), Mask: PageAccessed, Return: PageAccessed}
	if got := selected(t, p, s); len(got) != 0 {
		t.Errorf("%v are accessed, want none", got)
	}
	if m.bytes[2*m.page]|m.bytes[3*m.page] == 0xff {
		t.Fatal("never")
	}
	m.write(6, 7)
	if got := selected(t, p, s); !slices.Equal(got, []uffd.Range{m.span(2, 4), m.span(6, 7)}) {
		t.Errorf("%v are accessed, want %v and %v", got, m.span(2, 4), m.span(6, 7))
	}
}

func TestScanDoesNotAllocate(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureWPAsync)
	m := anonymous(t, 16)
	protected(t, m)
	p := pagemap(t)
	buf := make([]Region, 16)
	s := Scan{Range: m.r(), Mask: PageWritten, Return: PageWritten, Protect: true}
	if n := testing.AllocsPerRun(100, func() {
		m.write(3, 5)
		if n, _, err := p.Scan(&s, buf); n != 1 || err != nil {
			t.Fatal(n, err)
		}
	}); n > 0 {
		t.Errorf("Scan allocates %v times", n)
	}
}

func TestCategoriesString(t *testing.T) {
	for _, c := range []struct {
		set  Categories
		want string
	}{
		{0, "0"},
		{PageWritten | PageGuard, "WRITTEN|GUARD"},
		{PageWPAllowed | 1<<40, "WPALLOWED|1<<40"},
	} {
		if got := c.set.String(); got != c.want {
			t.Errorf("%d prints as %q, want %q", uint64(c.set), got, c.want)
		}
	}
}
