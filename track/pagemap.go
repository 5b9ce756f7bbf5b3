package track

import (
	"fmt"
	"io"
	"iter"
	"math/bits"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/go-uffd/uffd"
)

// Categories is a set of what PAGEMAP_SCAN can say of a page (PAGE_IS_*). Bits
// that this package does not know are kept.
type Categories uint64

// The categories of Linux 7.3. Those without a version came with PAGEMAP_SCAN,
// in Linux 6.7.
const (
	PageWPAllowed Categories = 1 << 0 // registered for write protection with FeatureWPAsync
	PageWritten   Categories = 1 << 1 // written, or discarded (see Scan), since it was protected; never protected
	PageFile      Categories = 1 << 2 // of a file, or of shared memory
	PagePresent   Categories = 1 << 3 // in memory
	PageSwapped   Categories = 1 << 4 // swapped out; also marks on pages that do not exist, like a protection
	PagePFNZero   Categories = 1 << 5 // the shared page of zeros
	PageHuge      Categories = 1 << 6 // mapped as part of a huge page
	PageSoftDirty Categories = 1 << 7 // written since /proc/PID/clear_refs was
	PageGuard     Categories = 1 << 8 // a guard that madvise(2) installed (after Linux 6.12)
	PageAccessed  Categories = 1 << 9 // registered with RegisterRWP, and accessed since it was protected (Linux 7.3)
)

var categoryNames = []string{
	"WPALLOWED", "WRITTEN", "FILE", "PRESENT", "SWAPPED", "PFNZERO", "HUGE", "SOFT_DIRTY", "GUARD", "ACCESSED",
}

// Has reports whether c contains all of x.
func (c Categories) Has(x Categories) bool { return c&x == x }

// String lists the categories by the kernel's names, without the prefix
// PAGE_IS_; an unknown bit n reads "1<<n".
func (c Categories) String() string {
	if c == 0 {
		return "0"
	}
	var list []string
	for ; c != 0; c &= c - 1 {
		bit := bits.TrailingZeros64(uint64(c))
		if bit < len(categoryNames) {
			list = append(list, categoryNames[bit])
		} else {
			list = append(list, "1<<"+strconv.Itoa(bit))
		}
	}
	return strings.Join(list, "|")
}

// A Region is consecutive pages of the same categories: the kernel's struct
// page_region.
type Region struct {
	Start, End uffd.Addr
	Categories Categories // those of Scan.Return
}

// Range returns the pages of r.
func (r Region) Range() uffd.Range {
	return uffd.Range{Start: r.Start, Len: uint64(r.End - r.Start)}
}

// A Scan selects pages, and says what to do with them. A page is selected if,
// after the categories in Inverted were turned round, it has all of Mask and, if
// AnyOf is not 0, any of AnyOf:
//
//	c := categories ^ Inverted
//	selected := c&Mask == Mask && (AnyOf == 0 || c&AnyOf != 0)
//
// A scan that has PageWritten in Mask, AnyOf or Return passes over memory that is
// not PageWPAllowed: elsewhere, kernels before 7.3 call every page written. To
// see that memory all the same, put PageWPAllowed into Inverted.
//
// That a page was discarded, and not touched since, makes it PageWritten for a
// scan with Protect whose Mask and Return are PageWritten, on every kernel. For
// other scans some kernels (6.18, 7.0) do not count it.
type Scan struct {
	Range    uffd.Range // from the start of a page; the end is rounded up
	Inverted Categories
	Mask     Categories
	AnyOf    Categories
	Return   Categories // to be reported, as they are: not inverted
	MaxPages uint64     // stop after so many pages; 0 is no limit

	// Protect write-protects the selected pages that are written, in one step
	// with reporting them (PM_SCAN_WP_MATCHING). Memory that is not
	// PageWPAllowed is passed over.
	//
	// Protect hugetlb memory with File.WriteProtect once before: up to some
	// 6.12 and 7.1 the kernel locks itself up over huge pages that have never
	// been used.
	Protect bool

	// CheckAsync makes the scan fail with EPERM where it meets memory that is
	// not PageWPAllowed (PM_SCAN_CHECK_WPASYNC).
	CheckAsync bool
}

// A Pagemap is the page table of a process, as /proc/PID/pagemap shows it. It
// stays with the memory that the process had when it was opened, also after
// execve(2). All methods are safe for concurrent use.
type Pagemap struct {
	file *os.File
}

// OpenPagemap opens the page table of a process; 0 is the calling one. It takes
// the permission to read the process's memory (see PTRACE_MODE_READ in
// ptrace(2)), even for a Scan that protects pages.
//
// Errors: [fs.ErrNotExist] if there is no such process, [fs.ErrPermission].
func OpenPagemap(pid int) (*Pagemap, error) {
	f, err := os.Open(procFile(pid, "pagemap"))
	if err != nil {
		return nil, fmt.Errorf("track: %w", err)
	}
	return &Pagemap{f}, nil
}

func procFile(pid int, name string) string {
	if pid == 0 {
		return "/proc/self/" + name
	}
	return fmt.Sprintf("/proc/%d/%s", pid, name)
}

// Close closes p.
func (p *Pagemap) Close() error { return p.file.Close() }

// Scan fills regions with the pages that s selects, in the order of their
// addresses (PAGEMAP_SCAN, Linux 6.7). It returns how many regions there are, and
// the address to go on from: if that is less than s.Range.End(), regions is full
// or s.MaxPages are found. Pages from there on have been neither reported nor
// protected.
//
// Without regions it only checks s, and with CheckAsync the memory.
//
// If it fails, the regions that it returns have been found, and protected,
// before that.
//
// Memory that is not mapped is passed over; on some kernels so is all the memory
// of a process that has exited, which [Pagemap.Gone] tells apart.
//
// Errors: [errors.ErrUnsupported] before Linux 6.7; [uffd.ErrGone]; EINVAL if the range does not
// start on a page, or s names categories that the kernel does not know (see
// [Pagemap.Supports]), or Protect has no regions to report to; EFAULT if the
// range lies outside of what a process can map; EPERM with CheckAsync.
func (p *Pagemap) Scan(s *Scan, regions []Region) (n int, next uffd.Addr, err error) {
	if s.Protect {
		clear(regions)
	}
	return p.scanInto(s, regions)
}

// scanInto is Scan. With Protect, regions have to be zero: that shows how many
// there are if it fails.
func (p *Pagemap) scanInto(s *Scan, regions []Region) (n int, next uffd.Addr, err error) {
	switch end := s.Range.End(); {
	case end < s.Range.Start:
		err = invalid("the range runs past the end of the address space")
	case uint64(s.Range.Start)%uint64(os.Getpagesize()) != 0:
		err = invalid("the address is not a multiple of the page size")
	case s.Protect && len(regions) == 0:
		// The kernel would not look at what is selected and protect everything.
		err = invalid("Protect needs regions to report to; to protect everything use File.WriteProtect")
	default:
		n, next, err = p.scan(s, regions)
	}
	if err != nil {
		next = s.Range.Start
		if n > 0 {
			next = regions[n-1].End
		}
		return n, next, fmt.Errorf("track: scanning %v: %w", s.Range, err)
	}
	return n, next, nil
}

func invalid(why string) error { return fmt.Errorf("%s: %w", why, syscall.EINVAL) }

// mask is s.Mask with what PageWritten needs.
func (s *Scan) mask() Categories {
	if (s.Mask | s.AnyOf | s.Return).Has(PageWritten) && !s.Inverted.Has(PageWPAllowed) && !s.Protect {
		return s.Mask | PageWPAllowed
	}
	return s.Mask
}

// Regions calls Scan until the whole range is scanned. A last pair has the error
// if a scan fails. Protect is refused: what a loop that ends early had not seen
// yet would be lost; Writes does not lose it.
func (p *Pagemap) Regions(s Scan) iter.Seq2[Region, error] {
	return func(yield func(Region, error) bool) {
		if s.Protect {
			yield(Region{}, fmt.Errorf("track: scanning %v: %w", s.Range, invalid("Regions does not protect; use Scan or Writes")))
			return
		}
		buf := make([]Region, 512)
		limited, end := s.MaxPages != 0, s.Range.End()
		for {
			n, next, err := p.Scan(&s, buf)
			for _, r := range buf[:n] {
				if !yield(r, nil) {
					return
				}
				if limited {
					s.MaxPages -= r.Range().Len / uint64(os.Getpagesize())
				}
			}
			if err != nil {
				yield(Region{}, err)
				return
			}
			if next >= end || limited && s.MaxPages == 0 {
				return
			}
			s.Range = uffd.Range{Start: next, Len: uint64(end - next)}
		}
	}
}

// Supports reports whether the kernel knows all of c. It knows none before Linux
// 6.7.
func (p *Pagemap) Supports(c Categories) bool {
	_, _, err := p.Scan(&Scan{Mask: c, Inverted: PageWPAllowed}, nil)
	return err == nil
}

// Gone reports whether the memory exists no more: the process has exited, or
// called execve(2).
func (p *Pagemap) Gone() bool { return p.alive() == uffd.ErrGone }

// alive returns ErrGone if the memory exists no more, and an error if p is closed.
func (p *Pagemap) alive() error {
	return p.read(make([]byte, 8), 0)
}

// read reads the entries of the small pages from a on, 8 bytes each.
func (p *Pagemap) read(entries []byte, a uffd.Addr) error {
	_, err := p.file.ReadAt(entries, int64(uint64(a)/uint64(os.Getpagesize())*8))
	if err == io.EOF {
		return uffd.ErrGone
	}
	return err
}
