package evict

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/track"
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

	// With access protection only:
	pagemap *track.Pagemap // nil: there is none
	batch   int            // pages that leave together
	fresh   []uint64       // resident pages that are to be protected soon
	old     []byte         // of a page in the backing file
	scan    track.Scan
	found   [1]track.Region

	mu     sync.Mutex
	stats  Stats
	failed error // the last, for the pager's workers
}

type page struct {
	left     uint32 // memory.left when it was evicted last; 0: never
	resident bool
	dirty    bool // may differ from what the backing file has; not known with access protection
}

const (
	maxBatch = 64
	chances  = 8 // pages that may stay because they are used, for each that leaves
)

// open prepares the files.
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
	m.file, err = reopen(c.File)
	return err
}

// sample prepares for access protection.
func (m *memory) sample(pid int) (err error) {
	m.batch = max(1, min(m.room/8, maxBatch))
	m.fresh = make([]uint64, 0, (1+chances)*m.batch+1)
	m.old = make([]byte, m.size)
	m.scan = track.Scan{Mask: track.PageAccessed, Return: track.PageAccessed}
	m.pagemap, err = track.OpenPagemap(pid)
	return err
}

func (m *memory) close() error {
	if m.pagemap != nil {
		m.pagemap.Close()
	}
	return m.file.Close()
}

// find finds the pages that exist.
func (m *memory) find() (err error) {
	for off := int64(0); off < m.Size(); off += int64(m.size) {
		if off, err = nextPage(m.file, off); err != nil {
			return err
		}
		if off < 0 || off >= m.Size() {
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
		if err := m.makeRoom(); err != nil {
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
	m.came(i) // and may have been discarded since
	return nil
}

// fetch reads a page from the backing file, after making room for it.
func (m *memory) fetch(off int64) error {
	for m.resident() >= m.room {
		if err := m.makeRoom(); err != nil {
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
	if m.pagemap != nil {
		if len(m.fresh) >= m.batch {
			m.protectFresh() // not this one: who has asked for it uses it now
		}
		m.fresh = append(m.fresh, i)
	}
	back := p.left != 0
	if back && m.left-p.left < uint32(m.room) {
		m.hot.push(i)
	} else {
		m.cold.push(i)
	}
	p.resident, p.dirty = true, false
	m.mu.Lock()
	m.stats.Came++
	if back {
		m.stats.Back++
	}
	m.mu.Unlock()
	m.count()
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

// makeRoom makes room for a page, or for several.
func (m *memory) makeRoom() (err error) {
	if m.pagemap == nil {
		return m.evict(m.next())
	}
	// From here on, who touches a protected page waits. To switch that takes a lock
	// on all the memory of the process, so that pages leave several at a time.
	if err := m.setMode(0, uffd.FeatureRWPAsync); err != nil {
		return err
	}
	defer func() {
		// It wakes all who wait. They ask again, also for what has left meanwhile.
		err = errors.Join(err, m.setMode(uffd.FeatureRWPAsync, 0))
	}()
	for n, tries := 0, chances*m.batch; n < m.batch; {
		from := m.next()
		if i := from.front(); tries > 0 && m.accessed(i) {
			tries--
			from.pop()
			m.hot.push(i)
			m.fresh = append(m.fresh, i)
			m.kept()
			continue
		}
		if err := m.evict(from); err != nil {
			if n > 0 { // there is room; that page is the first to be tried next time
				return nil
			}
			return err
		}
		n++
	}
	return nil
}

func (m *memory) setMode(enable, disable uffd.Features) error {
	err := m.uffd.SetMode(enable, disable)
	if errors.Is(err, uffd.ErrGone) {
		return nil
	}
	return err
}

// next returns the queue whose first page is to leave.
func (m *memory) next() *queue {
	if m.cold.len() == 0 || 4*m.hot.len() > 3*m.room {
		return &m.hot
	}
	return &m.cold
}

// accessed reports whether page i was accessed since it was protected. Nothing
// depends on it but which page leaves.
func (m *memory) accessed(i uint64) bool {
	m.scan.Range = m.at(int64(i * m.size))
	n, _, err := m.pagemap.Scan(&m.scan, m.found[:])
	return n > 0 && err == nil
}

func (m *memory) kept() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stats.Kept++
}

// protectFresh protects pages so that their use shows from now on. If that fails,
// they are taken for used; eviction protects for itself.
func (m *memory) protectFresh() {
	for i := 0; i < len(m.fresh); {
		r := m.at(int64(m.fresh[i] * m.size))
		for i++; i < len(m.fresh) && m.fresh[i] == m.fresh[i-1]+1; i++ {
			r.Len += m.size
		}
		m.uffd.RWProtect(r, uffd.RWProtectRWP)
	}
	m.fresh = m.fresh[:0]
}

// evict evicts the first page of a queue. With access protection FeatureRWPAsync
// is off meanwhile.
func (m *memory) evict(from *queue) error {
	i := from.front()
	off := int64(i * m.size)
	save, written := m.pagemap != nil || m.pages[i].dirty, false
	if !save {
		at, err := nextPage(m.file, off)
		if err != nil {
			return err
		}
		save = at != off // the process has discarded it: it reads zeros
	}
	if save {
		var err error
		if written, err = m.save(off); err != nil {
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
	m.pages[i] = page{left: m.left}
	m.count()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stats.Evicted++
	if written {
		m.stats.Written++
	}
	return nil
}

// save writes a page to the backing file, if that has another. It stays protected:
// what is written to it later than that is a fault, which is not answered before
// the page is gone. Access protection has no effect on a page that is not mapped:
// a minor fault then, which waits just so.
func (m *memory) save(off int64) (written bool, err error) {
	if m.pagemap != nil {
		err = m.uffd.RWProtect(m.at(off), uffd.RWProtectRWP)
	} else {
		err = m.uffd.WriteProtect(m.at(off), uffd.WriteProtectWP)
	}
	if err != nil && !errors.Is(err, uffd.ErrGone) {
		return false, fmt.Errorf("protecting a page: %w", err)
	}
	if _, err := m.file.ReadAt(m.buf, off); err != nil {
		return false, fmt.Errorf("reading a page: %w", err)
	}
	if m.pagemap != nil { // which does not tell who only reads
		if _, err := m.backing.ReadAt(m.old, off); err != nil {
			return false, fmt.Errorf("reading the backing file: %w", err)
		}
		if bytes.Equal(m.buf, m.old) {
			return false, nil
		}
	}
	if _, err := m.backing.WriteAt(m.buf, off); err != nil {
		return false, fmt.Errorf("writing a page to the backing file: %w", err)
	}
	return true, nil
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
