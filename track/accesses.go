package track

import (
	"fmt"
	"iter"
	"slices"
	"sync"

	"github.com/go-uffd/uffd"
)

const accessFeatures = uffd.FeatureRWP | uffd.FeatureRWPAsync

// An Accesses finds out which pages of some ranges of memory are used: its
// working set. The kernel protects pages from every access, lifts the protection
// at the first one, without a message, and PAGEMAP_SCAN tells which pages have
// none (FeatureRWPAsync, Linux 7.3). Nobody waits for anything but the kernel.
//
// What counts is each read and write by the process itself and by system calls
// on its memory, and by whoever else goes through its addresses, as with
// ptrace(2) or process_vm_readv(2). A page that comes to exist counts as accessed,
// also if it is installed in advance: it is protected only when it is collected.
//
// What does not count are
//
//   - accesses through another mapping of the same file, by read(2) and write(2)
//     on it, or by a device or a system call that has had the page pinned since
//     before it was protected;
//   - accesses that are not collected before the page is discarded (madvise(2),
//     a hole in its file), nor the discarding itself; pages of shared memory that
//     the kernel reclaims are like discarded ones.
//
// Memory that is unmapped, moved with mremap(2), or mapped later is not tracked.
//
// The ranges consist of whole pages. Of a huge page, in hugetlb memory and in
// private anonymous memory of transparent huge pages, an access to any part
// counts for all of it. Memory that is to be told apart in small pages takes
// MADV_NOHUGEPAGE before it is used.
//
// The memory is private anonymous, shared, or hugetlb, and accessible: neither
// PROT_NONE nor a regular file. It cannot be tracked by [Writes], or by any other
// userfaultfd, at the same time.
//
// All methods are safe for concurrent use.
type Accesses struct {
	file      *uffd.File
	ranges    []uffd.Range // sorted
	areas     []area       // of the ranges, sorted
	pagemap   *Pagemap
	collector collector

	stop    sync.Once
	stopErr error
}

// OpenAccesses opens a userfaultfd for the calling process that suits
// [StartAccesses]: with FeatureRWP and FeatureRWPAsync.
//
// Errors: *[uffd.OpenError]; *[uffd.FeatureError], which is
// [errors.ErrUnsupported], before Linux 7.3, and where the kernel cannot protect
// from accesses: it does on amd64 and arm64, and on riscv64 if the processor has
// the extension that it takes.
func OpenAccesses() (*uffd.File, error) {
	return uffd.New(&uffd.Config{Require: accessFeatures})
}

// StartAccesses starts to track accesses to ranges of the memory of process pid,
// which has opened f with [OpenAccesses], or with its features; 0 is the calling
// process. A process can track its own memory, for nobody waits for an answer. f must
// serve nothing else. It belongs to the Accesses from then on, unless
// StartAccesses fails. Another process should close its own descriptor once it has
// sent it here: while it is open, the memory stays registered although the
// Accesses may be gone.
//
// Pages are accessed or not as of the moment that StartAccesses protects them
// (UFFDIO_REGISTER, UFFDIO_RWPROTECT).
//
// Errors: EINVAL if the ranges are not whole pages, overlap, or nothing is mapped
// in one of them, if the memory or f do not suit, or if f belongs to another
// process; those of [OpenPagemap], and of Register and RWProtect of [uffd.File].
func StartAccesses(f *uffd.File, pid int, ranges ...uffd.Range) (*Accesses, error) {
	a, err := startAccesses(f, pid, ranges)
	if err != nil {
		return nil, fmt.Errorf("track: starting: %w", err)
	}
	return a, nil
}

func startAccesses(f *uffd.File, pid int, ranges []uffd.Range) (*Accesses, error) {
	if missing := accessFeatures &^ f.Features(); missing != 0 {
		return nil, invalid(fmt.Sprintf("the userfaultfd lacks %v (Linux %s); open it with track.OpenAccesses",
			missing, missing.Since()))
	}
	if bad := f.Features() & (events | uffd.FeatureSigbus); bad != 0 {
		return nil, invalid(fmt.Sprintf("the userfaultfd has %v, which nobody would serve; open it with track.OpenAccesses", bad))
	}
	sorted, err := sortRanges(ranges)
	if err != nil {
		return nil, err
	}
	pagemap, err := OpenPagemap(pid)
	if err != nil {
		return nil, err
	}
	a := &Accesses{file: f, ranges: sorted, pagemap: pagemap, collector: collector{pagemap: pagemap}}
	if err := a.start(pid); err != nil {
		release(f, sorted)
		pagemap.Close()
		return nil, err
	}
	return a, nil
}

func (a *Accesses) start(pid int) error {
	for _, r := range a.ranges {
		if _, err := a.file.Register(r, uffd.RegisterRWP); err != nil {
			return err
		}
	}
	areas, err := readAreas(pid, a.ranges)
	if err != nil {
		return err
	}
	for _, r := range a.ranges {
		if !slices.ContainsFunc(areas, func(x area) bool { return x.rwp && r.Contains(x.Start) }) {
			return invalid(fmt.Sprintf("%v is not registered in this process; the userfaultfd belongs to another one", r))
		}
	}
	a.areas = areas
	for i := range areas {
		if err := a.protect(areas[i].Range, areas[i].page); err != nil {
			return err
		}
	}
	return nil
}

// protect protects what exists in r, which consists of pages of the given size.
func (a *Accesses) protect(r uffd.Range, page uint64) error {
	return patiently(func() error {
		return split(r, page, func(part uffd.Range) error { return a.file.RWProtect(part, uffd.RWProtectRWP) })
	})
}

// Collect returns the ranges that were accessed since they were last returned, or
// since StartAccesses, and protects them again (PAGEMAP_SCAN, UFFDIO_RWPROTECT):
// an access that counts is in this collection or in the next one, whenever it
// comes. One that comes while a page is being collected is in this one alone.
//
// The ranges come in the order of their addresses, and consist of whole pages,
// or huge pages (see [Accesses]). Consecutive pages may come as several ranges. A
// loop that ends early loses nothing: the rest comes with the next collection.
// To read the memory through the process's addresses is an access.
//
// A last pair has the error if there is one. One loop at a time.
//
// Errors: [uffd.ErrGone] if the process has exited, or called execve(2);
// [os.ErrClosed] after Stop.
func (a *Accesses) Collect() iter.Seq2[uffd.Range, error] { return a.collector.loop(a.collect) }

// collect reports false if yield did.
func (a *Accesses) collect(yield body) (more bool, err error) {
	// Area by area, for all pages of one are of the same size: what is found in
	// neighbours would come as one region.
	for i := range a.areas {
		area := &a.areas[i]
		s := Scan{Range: area.Range, Mask: PageAccessed, Return: PageAccessed}
		// Only what was found is protected. Other pages may be accessed in between:
		// they are found next time.
		protect := func(regions []Region) (int, error) {
			for k := range regions {
				if err := a.protect(regions[k].Range(), area.page); err != nil {
					return k + 1, err // a part of it may be protected
				}
			}
			return len(regions), nil
		}
		if more, err := a.collector.scan(s, protect, yield); !more || err != nil {
			return more, err
		}
	}
	return true, nil
}

// Stop ends the tracking, lifts the protection, and closes the userfaultfd. It
// ends a collection that is under way.
func (a *Accesses) Stop() error {
	a.stop.Do(func() {
		a.collector.stopped.Store(true)
		release(a.file, a.ranges)
		a.stopErr = a.file.Close()
		a.pagemap.Close()
	})
	return a.stopErr
}
