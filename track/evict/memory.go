package evict

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/go-uffd/uffd"
)

// A memory is the source of a Region's pages, and the place where they go. All
// methods but New's are called by the goroutine that serves faults: while it
// evicts a page, nobody lifts the page's protection.
type memory struct {
	uffd    *uffd.File
	where   uffd.Range
	file    *os.File // an open file of our own: it is sought in
	backing *os.File
	size    uint64 // of a page
	room    int    // pages

	pages []page
	cold  queue // resident pages, in the order in which they came
	hot   queue
	left  uint32 // pages that were evicted, so far
	buf   []byte // of a page

	mu     sync.Mutex
	stats  Stats
	failed error // the last, for the pager's workers
}

type page struct {
	left     uint32 // memory.left when it was evicted last; 0: never
	resident bool
	dirty    bool // may differ from what the backing file has
}

// open prepares the files, and finds the pages that exist.
func (m *memory) open(f *uffd.File, c *Config) error {
	m.uffd, m.where, m.backing = f, c.Range, c.Backing
	m.size = uint64(os.Getpagesize())
	// The kernel allocates a page before it finds that there is one already.
	m.room = int(min(uint64(c.Limit)/m.size, c.Range.Len/m.size+1)) - 1
	m.pages = make([]page, c.Range.Len/m.size)
	m.buf = make([]byte, m.size)
	m.stats.Limit = c.Limit
	if info, err := c.Backing.Stat(); err != nil {
		return err
	} else if info.Size() != 0 {
		return invalid("the backing file has %d bytes already", info.Size())
	}
	if err := allocate(c.Backing, int64(c.Range.Len)); err != nil {
		return fmt.Errorf("space for the backing file: %w", err)
	}
	var err error
	if m.file, err = reopen(c.File); err != nil {
		return err
	}
	for off := int64(0); off < int64(c.Range.Len); off += int64(m.size) {
		if off, err = nextPage(m.file, off); err != nil {
			m.file.Close()
			return err
		}
		if off < 0 || off >= int64(c.Range.Len) {
			break
		}
		i := uint64(off) / m.size
		m.pages[i] = page{resident: true, dirty: true}
		m.cold.push(i)
	}
	m.count()
	return nil
}

func (m *memory) resident() int { return m.cold.len() + m.hot.len() }

func (m *memory) count() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stats.Resident = int64(m.resident()) * int64(m.size)
	m.stats.Hot = uint64(m.hot.len())
}

// shrink evicts what is there beyond the limit.
func (m *memory) shrink() error {
	for m.resident() > m.room {
		if err := m.evict(); err != nil {
			return err
		}
	}
	return nil
}

// Size is the size of the memory.
func (m *memory) Size() int64 { return int64(m.where.Len) }

// Borrow installs pages: while use runs, nothing else happens to them.
func (m *memory) Borrow(off int64, n int, use func(p []byte) error) error {
	if uint64(n) != m.size || uint64(off)%m.size != 0 {
		return m.fail(fmt.Errorf("the pager asks for %d bytes", n)) // it was told to take one page
	}
	i := uint64(off) / m.size
	p := &m.pages[i]
	switch {
	case !p.resident:
		if err := m.fetch(off); err != nil {
			return m.fail(err)
		}
	default:
		// It is there, or the process has discarded it: nobody else does.
		clear(m.buf)
		p.dirty = true
	}
	if err := use(m.buf); err != nil {
		return err
	}
	if p.resident {
		return nil
	}
	switch at, err := nextPage(m.file, off); {
	case err != nil:
		return m.fail(err)
	case at != off: // the kernel has refused it
		return nil
	}
	m.came(i)
	return nil
}

// fetch reads a page from the backing file, after making room for it.
func (m *memory) fetch(off int64) error {
	for m.resident() >= m.room {
		if err := m.evict(); err != nil {
			return err
		}
	}
	_, err := m.backing.ReadAt(m.buf, off)
	return err
}

// at returns the page at an offset, in the process.
func (m *memory) at(off int64) uffd.Range {
	return uffd.Range{Start: m.where.Start + uffd.Addr(off), Len: m.size}
}

// came takes note of a page that is there now.
func (m *memory) came(i uint64) {
	p := &m.pages[i]
	back := p.left != 0
	if back && m.left-p.left < uint32(m.room) {
		m.hot.push(i)
	} else {
		m.cold.push(i)
	}
	p.resident, p.dirty = true, false
	m.count()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stats.Came++
	if back {
		m.stats.Back++
	}
}

// ReadAt is called when Borrow has failed, and says why: bytes that are installed
// later could be those of before an eviction.
func (m *memory) ReadAt(context.Context, []byte, int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failed == nil {
		return 0, errors.New("evict: pages are brought in one by one")
	}
	return 0, m.failed
}

func (m *memory) fail(err error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failed = fmt.Errorf("evict: %w", err)
	return m.failed
}

// beforeWrite is called before a protected page is written.
func (m *memory) beforeWrite(r uffd.Range) {
	m.pages[uint64(r.Start-m.where.Start)/m.size].dirty = true
}

// evict makes room for a page.
func (m *memory) evict() error {
	from := &m.cold
	if m.cold.len() == 0 || 4*m.hot.len() > 3*m.room {
		from = &m.hot
	}
	i := from.front()
	p := &m.pages[i]
	off := int64(i * m.size)
	if p.dirty {
		if err := m.save(off); err != nil {
			return err
		}
	}
	if err := punch(m.file, off, int64(m.size)); err != nil {
		return fmt.Errorf("freeing a page: %w", err)
	}
	from.pop()
	m.left++
	if m.left == 0 {
		m.left = 1
	}
	written := p.dirty
	*p = page{left: m.left}
	m.count()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stats.Evicted++
	if written {
		m.stats.Written++
	}
	return nil
}

// save writes a page to the backing file. It stays protected: what is written to
// it later than that is a fault, which is not answered before the page is gone.
func (m *memory) save(off int64) error {
	if err := m.uffd.WriteProtect(m.at(off), uffd.WriteProtectWP); err != nil && !errors.Is(err, uffd.ErrGone) {
		return fmt.Errorf("protecting a page: %w", err)
	}
	if _, err := m.file.ReadAt(m.buf, off); err != nil {
		return fmt.Errorf("reading a page: %w", err)
	}
	if _, err := m.backing.WriteAt(m.buf, off); err != nil {
		return fmt.Errorf("writing a page to the backing file: %w", err)
	}
	return nil
}

// A queue is first in, first out.
type queue struct {
	list []uint64
	head int
}

func (q *queue) len() int      { return len(q.list) - q.head }
func (q *queue) front() uint64 { return q.list[q.head] }
func (q *queue) push(i uint64) {
	if q.head > len(q.list)/2 && len(q.list) == cap(q.list) {
		q.list = q.list[:copy(q.list, q.list[q.head:])]
		q.head = 0
	}
	q.list = append(q.list, i)
}
func (q *queue) pop() { q.head++ }
