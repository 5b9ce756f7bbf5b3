package pager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/source"
)

// Events are the features with which a userfaultfd announces what becomes of its
// memory. A pager serves those that are enabled; [uffd.FeatureEventFork] needs
// privilege, so ask for them with [uffd.Config].Prefer.
const Events = uffd.FeatureEventFork | uffd.FeatureEventRemap | uffd.FeatureEventRemove | uffd.FeatureEventUnmap

// A Pager serves the faults of its clients. Its fields are set before the first
// call of Attach; the zero Pager is good to use.
type Pager struct {
	// Workers is how many reads of sources may be under way at a time, for
	// each client; 0 means 16. Sources in memory need none.
	Workers int

	// FaultAround is how many bytes a fault may bring in: the pages around it,
	// from the same aligned block. 0 means 64 KiB; 1 brings in one page. It
	// shrinks to one page by itself for a region whose faults jump about.
	FaultAround int

	// RetryFor is how long what fails is tried again, with growing pauses; 0
	// means one second, less than 0 not at all.
	RetryFor time.Duration

	// OnFailure is what becomes of a page that its source cannot deliver.
	OnFailure Failure

	// UnknownZero has faults outside of all regions read zeros, as is right
	// for memory that mremap(2) has grown. Else they count as failed.
	UnknownZero bool

	// ErrorHook is told what went wrong: a [*PageError] for a page that failed,
	// other errors for what is tried again. It must return soon, and not call
	// Close or Shutdown. Clients call it concurrently.
	ErrorHook func(*Client, error)

	mu      sync.Mutex
	clients []*Client
	retired Stats // of clients that are gone
}

// Failure is a way to deal with a page whose contents cannot be had.
type Failure uint8

const (
	// Poison makes whoever touches the page get SIGBUS. Where the kernel
	// cannot (before Linux 6.6), it is Hold.
	Poison Failure = iota
	// Hold lets whoever touches the page wait, until the process ends or
	// another Client takes over from this one.
	Hold
	// Zeros installs a page of zeros: the client goes on with wrong data.
	Zeros
)

// A Region is memory of a client and where its contents come from.
type Region struct {
	// Range is the memory, in whole pages.
	Range uffd.Range
	// Source has the contents. It stays in use until the client is closed.
	Source source.Source
	// Offset is where the contents of the first page are in Source.
	Offset int64
	// PageSize is the size of the memory's pages; 0 means the system's. For
	// hugetlb memory it is that of its huge pages; nothing else will do, for
	// the kernel does not say of a part of a page that it is missing. A page is
	// installed as a whole, and its client waits meanwhile: a good part of a
	// second for 1 GiB.
	PageSize int

	// Memory is the caller's own mapping of the same shared memory. The pager
	// then writes contents there and maps them in the client with Continue,
	// which is what minor faults need. Register such memory for missing pages
	// as well: the kernel fills holes with zeros without asking if it is
	// registered for minor faults alone. Shared memory that the client moves
	// with MREMAP_DONTUNMAP needs Memory: without, what stays behind is taken
	// for private, and zeros go into the file. Two Regions must not share
	// memory: neither would know what was written through the other one, and
	// write over it. The children of a process are taken care of.
	Memory []byte

	// BeforeWrite, if not nil, is called before a page is written for the first
	// time; the thread waits meanwhile. Pages are installed write-protected
	// then, and the memory must be registered for write protection. It can be
	// called more than once for a page, and must return soon. A panic in it is
	// reported, and the write goes on. Together with Memory it needs Linux 6.4.
	BeforeWrite func(page uffd.Range)
}

// PageError reports a page whose contents could not be had.
type PageError struct {
	Page   uffd.Range
	Action Failure // what was done; Hold also where poisoning was impossible
	Err    error   // why
}

func (e *PageError) Error() string {
	action := [...]string{"it was poisoned", "threads that touch it wait", "it reads zeros"}[e.Action]
	return fmt.Sprintf("pager: page %v failed, %s: %v", e.Page, action, e.Err)
}

// Unwrap returns why the page failed.
func (e *PageError) Unwrap() error { return e.Err }

// Attach makes a client of a userfaultfd that has been through API, with the
// regions that are registered with it. The File stays the caller's: Close of the
// client does not close it. From now on, until Close, only the client may read
// from it. A thread whose fault was read before by somebody who did not resolve it
// waits until it is woken: see [uffd.File.Wake].
//
// Errors: EINVAL if a region is not one, or overlaps another one;
// [errors.ErrUnsupported] if the kernel cannot do what a region asks for.
func (p *Pager) Attach(f *uffd.File, rs ...Region) (*Client, error) {
	c := newClient(p, f)
	for _, r := range rs {
		if err := c.addRegion(r); err != nil {
			return nil, err
		}
	}
	p.add(c)
	return c, nil
}

func (p *Pager) add(c *Client) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clients = append(p.clients, c)
}

func (c *Client) addRegion(r Region) error {
	refuse := func(format string, args ...any) error {
		return fmt.Errorf("pager: region %v: "+format+": %w", append(append([]any{r.Range}, args...), syscall.EINVAL)...)
	}
	base := os.Getpagesize()
	if r.PageSize == 0 {
		r.PageSize = base
	}
	size := uint64(r.PageSize)
	switch {
	case r.PageSize < base || size&(size-1) != 0:
		return refuse("%d is not the size of a page", r.PageSize)
	case r.Range.Len == 0 || uint64(r.Range.Start)%size != 0 || r.Range.Len%size != 0 || r.Range.End() < r.Range.Start:
		return refuse("not whole pages of %d bytes", r.PageSize)
	case r.Source == nil:
		return refuse("has no source; source.Zero makes zeros")
	case r.Offset < 0 || uint64(r.Offset) > 1<<63-1-r.Range.Len:
		return refuse("bad offset %d", r.Offset)
	case r.Memory != nil && uint64(len(r.Memory)) != r.Range.Len:
		return refuse("Memory has %d bytes", len(r.Memory))
	}
	if r.Memory != nil && r.BeforeWrite != nil && !hasContinueWP() {
		return fmt.Errorf("pager: region %v: BeforeWrite of a region with Memory needs Linux %s: %w",
			r.Range, continueWP.Since(), errors.ErrUnsupported)
	}
	for _, other := range c.loop.regions {
		if overlap(other.Range, r.Range) {
			return refuse("overlaps %v", other.Range)
		}
	}
	added := &region{
		Range:       r.Range,
		pageSize:    size,
		source:      r.Source,
		offset:      r.Offset,
		memory:      r.Memory,
		beforeWrite: r.BeforeWrite,
		home:        len(c.homes),
	}
	added.states = newPages(added.pages())
	added.around.window = c.aroundPages(size)
	c.loop.regions.insert(added)
	c.homes = append(c.homes, r)
	var file *sharedFile
	if r.Memory != nil {
		file = &sharedFile{written: newPages(added.pages())}
	}
	c.files = append(c.files, file)
	return nil
}

// continueWP came with ContinueWP, which no feature tells of.
const continueWP = uffd.FeatureWPUnpopulated

// hasContinueWP reports false if the kernel is known to lack it.
func hasContinueWP() bool {
	offered, err := uffd.Probe()
	return err != nil || offered.Has(continueWP)
}

// ErrShutdown is returned by Serve after Shutdown.
var ErrShutdown = errors.New("pager: shut down")

// Shutdown ends the Serve of all clients, and waits until they have returned, or
// until ctx ends. No fault is lost: see [Client.Serve]. New clients are not kept
// from being served.
func (p *Pager) Shutdown(ctx context.Context) error {
	p.mu.Lock()
	clients := slices.Clone(p.clients)
	p.mu.Unlock()
	for _, c := range clients {
		c.family.interrupt(ErrShutdown)
	}
	for _, c := range clients {
		if err := c.family.wait(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Stats adds up the numbers of all clients, also of those that are gone.
func (p *Pager) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	sum := p.retired
	for _, c := range p.clients {
		s := c.Stats()
		sum.add(&s)
	}
	return sum
}

// forget drops a client that is closed.
func (p *Pager) forget(c *Client) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(p.clients, c); i >= 0 {
		p.clients = slices.Delete(p.clients, i, i+1)
		s := c.Stats()
		p.retired.add(&s)
	}
}
