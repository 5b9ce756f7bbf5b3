// Package evict bounds how much memory a region of another process takes.
//
// The region is shared memory of a memfd. At most Limit bytes of it are in
// memory at a time; the rest is in a backing file, and comes back when the
// process touches it:
//
//	// f, in the process: uffd.New(&uffd.Config{Require: evict.Features, Prefer: evict.PreferredFeatures})
//	r, err := evict.New(f, pid, evict.Config{Range: mem, File: memfd, Backing: swap, Limit: 1 << 30})
//	...
//	err = r.Serve(ctx) // until the process is gone
//
// # How a page leaves
//
// A page is protected first. Who writes to it waits from then on, so what is
// copied to the backing file is what is there when a hole is punched into the
// memfd. Whoever touches it afterwards faults for a missing page, also who waited,
// and it comes back. Faults and evictions are the work of one goroutine, one at a
// time: no page comes while it goes.
//
// # Which page leaves
//
// Pages leave in the order in which they came. One that comes back before as many
// others have left as there is room for was taken too early: it is hot, and
// leaves only when hot pages take more than three quarters of the memory.
//
// What else is known of a page depends on the kernel, for memory cannot be
// registered for write protection and for access protection at a time.
//
// With [PreferredFeatures] (Linux 7.3) pages are protected from accesses soon
// after they came, and the kernel lifts that at the next access, without a message
// (RWP_ASYNC). A page that was accessed when it is its turn to leave is hot; it
// stays, is protected again, and another one's turn comes. After eight of those
// for each page that has to go, the next ones leave, hot or not: the limit holds in
// any case. Pages leave several at a time, up to an eighth of the memory and no more than 64:
// meanwhile accesses to protected pages wait, and to switch that takes the lock of
// the process's memory. A page is written to the backing file if it is not the
// same as what is there.
//
// Without, the kernel does not tell who reads a page: what is used is found out by
// taking it away. Pages come write-protected, so that the first write is a fault,
// and one that was not written since it came is not written to the backing file.
//
// # What the process must not do
//
// The memory belongs to one process, which maps it once, with MADV_DONTFORK, for
// a forked child would find zeros in place of what is in the backing file; so
// would whoever else maps or reads the memfd. The process must not move it with
// mremap(2), which ends its registration, nor unmap a part of it: a page that
// cannot be protected cannot leave, and soon no other could come. It must not make
// the memfd shorter, and must not have the memory pinned for devices
// (O_DIRECT, io_uring's registered buffers, vfio) or written with
// process_vm_writev(2). If it discards pages that are in memory with MADV_REMOVE,
// they read zeros; what is in the backing file comes back.
package evict

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/pager"
)

// Features are what a userfaultfd needs for a [Region] (Linux 5.19).
const Features = uffd.FeatureMissingShmem | uffd.FeaturePagefaultFlagWP | uffd.FeatureWPHugetlbfsShmem

// PreferredFeatures are what a userfaultfd should have, too: with them the Region
// learns which pages are used without taking them away (Linux 7.3). Open the
// userfaultfd with
//
//	&uffd.Config{Require: evict.Features, Prefer: evict.PreferredFeatures}
const PreferredFeatures = uffd.FeatureRWP | uffd.FeatureRWPAsync

// A Config describes a [Region].
type Config struct {
	// Range is the memory in the process: a shared mapping of File from its
	// start on.
	Range uffd.Range

	// File is the memory itself: a memfd, or a file on tmpfs. What is in it
	// already stays, and is evicted as need be. It can be closed after New.
	File *os.File

	// Backing is where pages go: an empty file, which gets the size of Range
	// and all of its space at once. It stays in use, and the caller's.
	Backing *os.File

	// Limit is how many bytes may be in memory, at least MinLimit pages. One
	// page of it is for the kernel, which allocates before it looks.
	Limit int64

	// ErrorHook, if not nil, is told what goes wrong: a page that cannot be
	// evicted or brought back is a [*pager.PageError], and whoever touches the
	// page that was to come gets SIGBUS. It must return soon, and not call Stop.
	ErrorHook func(error)
}

// MinLimit is the least Limit, in pages.
const MinLimit = 16

// Stats are the numbers of a [Region], in pages but for Limit and Resident.
type Stats struct {
	Limit    int64  // bytes
	Resident int64  // bytes in memory
	Hot      uint64 // pages in memory that came back soon, or were to leave and stayed
	Came     uint64 // pages that were brought in
	Back     uint64 // of them, those that had been evicted
	Evicted  uint64
	Written  uint64 // of them, those that had to be written to the backing file
	Kept     uint64 // times a page was to leave and stayed, for it had been accessed; 0 without PreferredFeatures
}

// A Region is memory of a process that is kept under a limit.
type Region struct {
	memory memory
	client *pager.Client
	pager  pager.Pager
	stop   sync.Once
	err    error
}

// New puts memory of process pid, which has opened f, under a limit. It registers
// the memory for missing pages and, if f has [PreferredFeatures], for minor faults
// and access protection, otherwise for write protection. f must serve nothing
// else; it belongs to the Region from then on, unless New fails, and must have
// [Features] and no events. The process may use the memory from then on: who
// touches what is not there waits for Serve.
//
// When f is closed, by Stop or with this process, missing memory reads as zeros:
// end the process first.
//
// Errors: EINVAL if something in the Config does not suit, if the Range is not
// the File's throughout, or may be shared with forked children; ENOSPC if there
// is no space for the backing file; those of [uffd.File.Register].
func New(f *uffd.File, pid int, c Config) (*Region, error) {
	r, err := newRegion(f, pid, &c)
	if err != nil {
		return nil, fmt.Errorf("evict: %w", err)
	}
	return r, nil
}

func newRegion(f *uffd.File, pid int, c *Config) (*Region, error) {
	features := f.Features()
	page := int64(os.Getpagesize())
	if missing := Features &^ features; missing != 0 {
		return nil, invalid("the userfaultfd lacks %v", missing)
	}
	if bad := features & (pager.Events | uffd.FeatureSigbus | uffd.FeatureWPAsync); bad != 0 {
		return nil, invalid("the userfaultfd must not have %v", bad)
	}
	if c.Limit < MinLimit*page {
		return nil, invalid("the limit is %d bytes, less than %d pages", c.Limit, MinLimit)
	}
	if c.Range.Len == 0 || (uint64(c.Range.Start)|c.Range.Len)%uint64(page) != 0 || c.Range.End() < c.Range.Start {
		return nil, invalid("%v does not consist of whole pages", c.Range)
	}
	if err := checkMapping(pid, c.Range, c.File); err != nil {
		return nil, err
	}
	r := &Region{}
	m := &r.memory
	if err := m.open(f, c); err != nil {
		return nil, err
	}
	memory := pager.Region{Range: c.Range, Source: m}
	mode := uffd.RegisterMissing
	var err error
	if features.Has(PreferredFeatures) {
		// A page that the file has and the page table has not cannot be
		// protected: nobody may map it but with a fault.
		mode |= uffd.RegisterMinor | uffd.RegisterRWP
		err = m.sample(pid)
	} else {
		mode |= uffd.RegisterWP
		memory.BeforeWrite = m.beforeWrite
	}
	r.pager = pager.Pager{FaultAround: 1, RetryFor: -1}
	if c.ErrorHook != nil {
		r.pager.ErrorHook = func(_ *pager.Client, err error) { c.ErrorHook(err) }
	}
	if err == nil {
		_, err = f.Register(c.Range, mode)
	}
	if err == nil {
		r.client, err = r.pager.Attach(f, memory)
	}
	if err == nil {
		err = m.find() // what was there already
	}
	if err == nil && m.pagemap != nil {
		err = f.RWProtect(c.Range, uffd.RWProtectRWP)
	}
	if err == nil {
		err = m.shrink()
	}
	if err != nil {
		f.Unregister(c.Range)
		f.Wake(c.Range)
		m.close()
		return nil, err
	}
	return r, nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, syscall.EINVAL)...)
}

// Serve brings pages in, and others out, until the process is gone: then it
// returns nil. It returns the error of ctx if that ends before; threads that touch
// missing pages wait then, until Serve is called again. See [pager.Client.Serve].
func (r *Region) Serve(ctx context.Context) error { return r.client.Serve(ctx) }

// Stats returns the numbers so far.
func (r *Region) Stats() Stats {
	r.memory.mu.Lock()
	defer r.memory.mu.Unlock()
	return r.memory.stats
}

// Stop ends Serve and closes the userfaultfd. If the process is still there, its
// memory reads as zeros from then on where it is in the backing file.
func (r *Region) Stop() error {
	r.stop.Do(func() {
		r.err = errors.Join(r.client.Close(), r.memory.uffd.Close(), r.memory.close())
	})
	return r.err
}
