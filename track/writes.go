package track

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/go-uffd/uffd"
)

// Method is how a [Writes] learns of writes.
type Method uint8

const (
	// Async has the kernel lift the protection of a page at its first write, and
	// PAGEMAP_SCAN tell which pages have none (FeatureWPAsync, Linux 6.7).
	Async Method = 1 + iota

	// Sync answers a fault for the first write to each page after it was
	// collected; the writer sleeps until then (Linux 5.7).
	Sync
)

// String returns "async" or "sync".
func (m Method) String() string {
	switch m {
	case Async:
		return "async"
	case Sync:
		return "sync"
	}
	return fmt.Sprintf("Method(%d)", uint8(m))
}

// A Writes finds out which pages of some ranges of memory are written. What
// counts is each write by the process itself and by system calls on its memory,
// also the first one to a page that did not exist, and that a page of private
// anonymous memory is discarded with madvise(2).
//
// What does not count are writes that do not go through the memory: through
// another mapping of the same file, by write(2) to it, or by a device; nor that
// private pages of a file are discarded, which brings the file's back, or that
// a hole is punched into a file or into shared memory (MADV_REMOVE,
// fallocate(2)). Memory that is unmapped, moved with mremap(2), or mapped later
// is not tracked. Memory that is tracked must not be merged by KSM
// (MADV_MERGEABLE), which hides writes, and is not made of new transparent huge
// pages.
//
// With the method Sync
//
//   - the memory is private anonymous, or from Linux 5.19 on also shared or
//     hugetlb; with Async it can be almost any;
//   - pages of private anonymous memory that do not exist are allocated when they
//     are read, not only when they are written;
//   - a userfaultfd that traps only user faults makes the process's system calls
//     fail with EFAULT that write to pages not written yet;
//   - that a page is discarded counts only if the userfaultfd has
//     FeatureEventRemove; else the next write to it does.
//
// All methods are safe for concurrent use.
type Writes struct {
	file    *uffd.File
	ranges  []uffd.Range // sorted
	pagemap *Pagemap
	faults  *faults // with Sync

	collector collector

	stop    sync.Once
	stopErr error
}

// Open opens a userfaultfd for the calling process that suits [Start]: with
// FeatureWPAsync where the kernel has it, else with FeatureEventRemove.
//
// Errors: *[uffd.OpenError]; [errors.ErrUnsupported] if the kernel has no write
// protection (Linux 5.7, on amd64, arm64 and riscv64).
func Open() (*uffd.File, error) {
	f, err := uffd.New(&uffd.Config{Require: uffd.FeatureWPAsync})
	if errors.Is(err, errors.ErrUnsupported) {
		return openSync()
	}
	return f, err
}

// openSync opens a userfaultfd without FeatureWPAsync.
func openSync() (*uffd.File, error) {
	if err := checkProtection(); err != nil {
		return nil, err
	}
	return uffd.New(&uffd.Config{
		Require: uffd.FeaturePagefaultFlagWP,
		Prefer:  uffd.FeatureEventRemove,
	})
}

// Start starts to track writes to ranges of the memory of process pid, which has
// opened f: mostly another process; 0 is the calling one. f must serve nothing
// else. It belongs to the Writes from then on, unless Start fails. The process
// should close its own descriptor once it has sent it here: while it is open,
// the memory stays registered although the Writes may be gone.
//
// The method is Async if f has FeatureWPAsync, else Sync. Sync is refused for
// the calling process: a goroutine that waits for another one to answer its
// fault can hang the whole process (see package uffd).
//
// Pages are written or not as of the moment that Start protects them.
//
// Errors: [errors.ErrUnsupported] for Sync in the calling process; EINVAL if the
// ranges are not whole pages, overlap, or nothing is mapped in one of them, if
// the memory or f do not suit, or if f belongs to another process; those of
// [OpenPagemap], and of Register and WriteProtect of [uffd.File].
func Start(f *uffd.File, pid int, ranges ...uffd.Range) (*Writes, error) {
	w, err := start(f, pid, ranges)
	if err != nil {
		return nil, fmt.Errorf("track: starting: %w", err)
	}
	return w, nil
}

const events = uffd.FeatureEventFork | uffd.FeatureEventRemap | uffd.FeatureEventRemove | uffd.FeatureEventUnmap

func start(f *uffd.File, pid int, ranges []uffd.Range) (*Writes, error) {
	features := f.Features()
	async := features.Has(uffd.FeatureWPAsync)
	bad := features & (events | uffd.FeatureSigbus)
	if !async {
		bad &^= uffd.FeatureEventRemove
	}
	if bad != 0 {
		return nil, invalid(fmt.Sprintf("the userfaultfd has %v, which nobody would serve; open it with track.Open", bad))
	}
	if !async && (pid == 0 || pid == os.Getpid()) {
		return nil, fmt.Errorf("without FeatureWPAsync (Linux %s) a process cannot track its own writes: %w",
			uffd.FeatureWPAsync.Since(), errors.ErrUnsupported)
	}
	sorted, err := sortRanges(ranges)
	if err != nil {
		return nil, err
	}
	pagemap, err := OpenPagemap(pid)
	if err != nil {
		return nil, err
	}
	w := &Writes{file: f, ranges: sorted, pagemap: pagemap, collector: collector{pagemap: pagemap}}
	if async {
		err = w.startAsync()
	} else {
		w.faults, err = startFaults(f, pagemap, pid, sorted)
	}
	if err != nil {
		release(f, sorted)
		pagemap.Close()
		return nil, err
	}
	return w, nil
}

// sortRanges returns ranges in the order of their addresses.
func sortRanges(ranges []uffd.Range) ([]uffd.Range, error) {
	sorted := slices.SortedFunc(slices.Values(ranges), func(a, b uffd.Range) int { return cmp.Compare(a.Start, b.Start) })
	for i, r := range sorted {
		if r.Len == 0 || (uint64(r.Start)|r.Len)%pageSize() != 0 || r.End() < r.Start {
			return nil, invalid(fmt.Sprintf("%v does not consist of whole pages", r))
		}
		if i > 0 && sorted[i-1].End() > r.Start {
			return nil, invalid(fmt.Sprintf("%v and %v overlap", sorted[i-1], r))
		}
	}
	return sorted, nil
}

func (w *Writes) startAsync() error {
	for _, r := range w.ranges {
		if _, err := w.file.Register(r, uffd.RegisterWP); err != nil {
			return err
		}
		if err := patiently(func() error { return protect(w.file, r, pageSize()) }); err != nil {
			return err
		}
		// A scan of another process's memory would not fail. It would find
		// nothing.
		var found [1]Region
		n, _, err := w.pagemap.Scan(&Scan{Range: r, Mask: PageWPAllowed, Return: PageWPAllowed, MaxPages: 1}, found[:])
		if err != nil {
			return err
		}
		if n == 0 {
			return invalid(fmt.Sprintf("%v is not write-protected in this process; the userfaultfd belongs to another one", r))
		}
	}
	return nil
}

// Method returns how w learns of writes.
func (w *Writes) Method() Method {
	if w.faults != nil {
		return Sync
	}
	return Async
}

// Collect returns the ranges that were written since they were last returned, or
// since Start, and resets them in the same step: a write is in this collection
// or in the next one, whenever it comes, and what is read from the memory after
// the range was returned contains all writes that are in no later collection.
//
// The ranges come in the order of their addresses, and consist of whole pages;
// of whole huge pages in hugetlb memory. Consecutive pages may come as several
// ranges. A loop that ends early loses nothing: the rest comes with the next
// collection. With Sync, a page can come once more than it was written: a signal
// makes a thread report its fault twice. And a page that is discarded comes with
// each collection until it is gone, or written, which with MADV_FREE takes until
// the kernel needs the memory.
//
// A last pair has the error if there is one. One loop at a time.
//
// Errors: [uffd.ErrGone] if the process has exited, or called execve(2);
// [os.ErrClosed] after Stop; with Sync, whatever kept w from answering a fault,
// which ends the tracking and lets the process go on.
func (w *Writes) Collect() iter.Seq2[uffd.Range, error] {
	return w.collector.loop(w.collect)
}

// collect reports false if yield did.
func (w *Writes) collect(yield body) (more bool, err error) {
	if w.faults != nil {
		return w.faults.collect(yield)
	}
	for _, r := range w.ranges {
		s := Scan{Range: r, Mask: PageWritten, Return: PageWritten, Protect: true}
		if more, err := w.collector.scan(s, nil, yield); !more || err != nil {
			return more, err
		}
	}
	return true, nil
}

// Stop ends the tracking, lifts the protection, and closes the userfaultfd. It
// ends a collection that is under way.
func (w *Writes) Stop() error {
	w.stop.Do(func() {
		w.collector.stopped.Store(true)
		release(w.file, w.ranges)
		w.stopErr = w.file.Close()
		if w.faults != nil {
			w.faults.wait()
		}
		w.pagemap.Close()
	})
	return w.stopErr
}

// release unregisters ranges and lets their writers go on. It is not an error if
// something else is mapped there now.
func release(f *uffd.File, ranges []uffd.Range) {
	for _, r := range ranges {
		_ = split(r, pageSize(), f.Unregister)
		_ = f.Wake(r)
	}
}

func pageSize() uint64 { return uint64(os.Getpagesize()) }

// protect write-protects what is registered in r, which consists of pages of the
// given size.
func protect(f *uffd.File, r uffd.Range, page uint64) error {
	return split(r, page, func(part uffd.Range) error { return f.WriteProtect(part, uffd.WriteProtectWP) })
}

// split calls do for r, and for the halves of what it refuses: some calls work
// on one mapping only (WriteProtect before Linux 6.4), or not at all if part of
// a range is not registered or not mapped. It passes over pages that do refuses.
func split(r uffd.Range, page uint64, do func(uffd.Range) error) error {
	err := do(r)
	if !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.EINVAL) {
		return err
	}
	if r.Len <= page {
		return nil
	}
	half := r.Len / page / 2 * page
	return cmp.Or(
		split(uffd.Range{Start: r.Start, Len: half}, page, do),
		split(r.Skip(int64(half)), page, do),
	)
}

// retryDelay is how long to wait when the kernel says to try again.
const retryDelay = time.Millisecond

// patiently calls do until the process does not change its mappings any more.
func patiently(do func() error) error {
	for {
		err := do()
		if !errors.Is(err, uffd.ErrRetry) {
			return err
		}
		time.Sleep(retryDelay)
	}
}
