package pager

import "sync"

// A state says what a page holds, and so what to do when it is touched.
type state uint8

const (
	absent       state = iota // the source has it
	reading                   // a worker reads it from the source
	present                   // installed from the source
	presentWoken              // the same, and a thread that still asked for it was woken
	removed                   // discarded: zeros
	zeroed                    // discarded, and installed as zeros
	zeroedWoken               // the same, and a thread was woken
	poisoned                  // touching it raises SIGBUS
	held                      // the source failed; whoever touches it waits
)

// pages has the state of each page of a region, four bits each, in chunks that
// come into being when a state is set.
type pages struct {
	chunks []*chunk
}

const (
	chunkBytes = 4096
	chunkPages = 2 * chunkBytes
)

type chunk [chunkBytes]uint8

func newPages(n uint64) *pages {
	return &pages{make([]*chunk, (n+chunkPages-1)/chunkPages)}
}

func (p *pages) get(i uint64) state {
	c := p.chunks[i/chunkPages]
	if c == nil {
		return absent
	}
	return c.get(i % chunkPages)
}

func (p *pages) set(i uint64, s state) {
	c := p.chunks[i/chunkPages]
	if c == nil {
		if s == absent {
			return
		}
		c = p.grow(i)
	}
	c.set(i%chunkPages, s)
}

// filled notes that page i is there.
func (p *pages) filled(i uint64) {
	c := p.chunks[i/chunkPages]
	if c == nil {
		c = p.grow(i)
	}
	i %= chunkPages
	switch c.get(i) {
	case removed, zeroed, zeroedWoken:
		c.set(i, zeroed)
	default:
		c.set(i, present)
	}
}

func (p *pages) grow(i uint64) *chunk {
	c := new(chunk)
	p.chunks[i/chunkPages] = c
	return c
}

func (c *chunk) get(i uint64) state { return state(c[i/2] >> (i % 2 * 4) & 0xf) }

func (c *chunk) set(i uint64, s state) {
	b, shift := &c[i/2], i%2*4
	*b = *b&^(0xf<<shift) | uint8(s)<<shift
}

func (p *pages) clone() *pages {
	q := &pages{make([]*chunk, len(p.chunks))}
	for i, c := range p.chunks {
		if c != nil {
			d := *c
			q.chunks[i] = &d
		}
	}
	return q
}

// A sharedFile is the file of a Region's Memory, which a parent and its children
// have in common. It knows which pages were written: whoever asks for one next
// gets what is there, and zeros if it was discarded.
type sharedFile struct {
	mu      sync.Mutex // held while pages are written and mapped
	written *pages     // present
}

func (f *sharedFile) has(r *region, i uint64) bool { return f.written.get(r.first+i) != absent }

func (f *sharedFile) add(r *region, first, n uint64) {
	for i := first; i < first+n; i++ {
		f.written.set(r.first+i, present)
	}
}

func (f *sharedFile) drop(r *region, i uint64) { f.written.set(r.first+i, absent) }

// adopt takes note of the pages that another pager has written.
func (f *sharedFile) adopt(states *pages, n uint64) {
	for i := range n {
		switch states.get(i) {
		case present, presentWoken, zeroed, zeroedWoken:
			f.written.set(i, present)
		}
	}
}
