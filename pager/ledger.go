package pager

import (
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/go-uffd/uffd"
)

// A ledger is what a client knows, in memory that outlives it: a file that other
// processes hold, too. Whatever happens between two instructions, the next
// client finds it whole.
//
// The file is the header, what the regions were when they were attached, the
// states of their pages, and two tables of where the regions are now, one of
// which counts. It is of one machine, in that machine's byte order.
type ledger struct {
	file    *os.File // holds the lock
	mem     []byte
	head    *ledgerHead
	tables  *[2]ledgerTable
	states  []*pages // of each region
	reader  *ledgerReader
	adopted bool // somebody has used it before
	lost    int  // children that died with the predecessor
}

const (
	ledgerMagic   = 0x7566666470616765 // written last when a ledger is begun
	ledgerVersion = 1
	ledgerAlign   = 4096
	maxRegions    = 1 << 16
	maxParts      = 4096
	maxZeros      = 1 << 47 // bytes: what a process has of addresses
)

type ledgerHead struct {
	magic    atomic.Uint64
	version  uint32
	regions  uint32
	children atomic.Int32  // that are served; they die with the pager
	full     atomic.Uint32 // there were more parts than a table takes
	active   atomic.Uint32 // the table that counts
	_        uint32

	// Pages that are written to the memory's own file, and that may be mapped
	// and written by their process: see settling.
	settling struct {
		n           atomic.Uint64
		home, first uint64
	}

	// Messages go here straight from the kernel: as soon as it forgets one, it
	// is here. Those that were dealt with have no event.
	msgs [64]uffd.Msg
}

// A ledgerHome is a Region as it was attached.
type ledgerHome struct{ start, length, pageSize, offset, flags uint64 }

const (
	homeHasMemory = 1 << iota
	homeIsProtected
)

type ledgerTable struct {
	applied atomic.Uint32 // so many of msgs have been applied to it
	count   uint32
	sum     uint32 // CRC-32C of parts[:count]
	_       uint32
	parts   [maxParts]ledgerPart
}

// A ledgerPart is a region.
type ledgerPart struct {
	start, length, first uint64
	home                 uint32
	zeros                uint32 // 1: it has no source
}

func homeOf(r Region) ledgerHome {
	h := ledgerHome{uint64(r.Range.Start), r.Range.Len, uint64(r.PageSize), uint64(r.Offset), 0}
	if r.Memory != nil {
		h.flags |= homeHasMemory
	}
	if r.BeforeWrite != nil {
		h.flags |= homeIsProtected
	}
	return h
}

// ledgerLayout returns where the homes, the states of each region, and the tables
// are, and how long the file is.
func ledgerLayout(homes []Region) (homesAt uint64, statesAt []uint64, tablesAt, size uint64) {
	align := func(n uint64) uint64 { return (n + ledgerAlign - 1) &^ (ledgerAlign - 1) }
	homesAt = align(uint64(unsafe.Sizeof(ledgerHead{})))
	at := align(homesAt + uint64(len(homes))*uint64(unsafe.Sizeof(ledgerHome{})))
	for _, r := range homes {
		statesAt = append(statesAt, at)
		at += (r.Range.Len/uint64(r.PageSize) + chunkPages - 1) / chunkPages * chunkBytes
	}
	return homesAt, statesAt, at, align(at + uint64(unsafe.Sizeof([2]ledgerTable{})))
}

// newLedger makes sense of the memory of a ledger, which is begun if it is empty.
// Memory is of the size that ledgerLayout says.
func newLedger(mem []byte, homes []Region) (*ledger, error) {
	homesAt, statesAt, tablesAt, _ := ledgerLayout(homes)
	l := &ledger{mem: mem}
	l.head = (*ledgerHead)(unsafe.Pointer(&mem[0]))
	l.tables = (*[2]ledgerTable)(unsafe.Pointer(&mem[tablesAt]))
	for i, r := range homes {
		p := newPages(r.Range.Len / uint64(r.PageSize))
		for k := range p.chunks {
			p.chunks[k] = (*chunk)(unsafe.Pointer(&mem[statesAt[i]+uint64(k)*chunkBytes]))
		}
		l.states = append(l.states, p)
	}
	stored := unsafe.Slice((*ledgerHome)(unsafe.Pointer(&mem[homesAt])), len(homes))
	switch magic := l.head.magic.Load(); {
	case magic == 0:
		l.head.version, l.head.regions = ledgerVersion, uint32(len(homes))
		for i, r := range homes {
			stored[i] = homeOf(r)
		}
		return l, nil
	case magic != ledgerMagic:
		return nil, fmt.Errorf("it is none: %w", syscall.EINVAL)
	case l.head.version != ledgerVersion:
		return nil, fmt.Errorf("it is of version %d: %w", l.head.version, errors.ErrUnsupported)
	case l.head.regions != uint32(len(homes)):
		return nil, fmt.Errorf("it has %d regions: %w", l.head.regions, syscall.EINVAL)
	case l.head.full.Load() != 0:
		return nil, fmt.Errorf("the memory is in more than %d parts: %w", maxParts, syscall.E2BIG)
	}
	for i, r := range homes {
		if stored[i] != homeOf(r) {
			return nil, fmt.Errorf("region %d is another one: %w", i, syscall.EINVAL)
		}
	}
	l.adopted = true
	return l, nil
}

// regions returns where the regions are now, of a ledger that was used before.
func (l *ledger) regions(homes []Region) (regions, error) {
	damaged := func(what string) (regions, error) {
		return nil, fmt.Errorf("it is damaged: %s: %w", what, syscall.EINVAL)
	}
	active := l.head.active.Load()
	if active > 1 {
		return damaged("no table")
	}
	t := &l.tables[active]
	if t.count > maxParts || t.applied.Load() > uint32(len(l.head.msgs)) || t.sum != t.checksum() {
		return damaged("wrong checksum")
	}
	var rs regions
	end, zeros := uffd.Addr(0), uint64(0)
	for _, p := range t.parts[:t.count] {
		if uint64(p.home) >= uint64(len(homes)) {
			return damaged("no such region")
		}
		home := homes[p.home]
		size := uint64(home.PageSize)
		r := &region{
			Range:       uffd.Range{Start: uffd.Addr(p.start), Len: p.length},
			pageSize:    size,
			beforeWrite: home.BeforeWrite,
			home:        int(p.home),
			first:       p.first,
		}
		if r.Len == 0 || r.Len%size != 0 || uint64(r.Start)%size != 0 || r.Start < end || r.End() <= r.Start {
			return damaged("impossible addresses")
		}
		end = r.End()
		within := r.first <= home.Range.Len/size && r.pages() <= home.Range.Len/size-r.first
		if !within && (p.zeros == 0 || home.Memory != nil) {
			return damaged("impossible pages")
		}
		if home.Memory != nil {
			r.memory = home.Memory[r.first*size:][:r.Len]
		}
		if p.zeros == 0 {
			r.source, r.offset, r.states = home.Source, home.Offset+int64(r.first*size), l.states[p.home]
		} else { // what is installed of it is not known, and found out
			if zeros += r.Len; r.Len > maxZeros || zeros > maxZeros {
				return damaged("too many zeros")
			}
			if !within {
				r.first = 0
			}
			r.states = newPages(r.first + r.pages())
		}
		rs = append(rs, r)
	}
	for _, p := range l.states {
		for i := range uint64(len(p.chunks)) * chunkPages {
			switch s := p.get(i); {
			case s > held:
				return damaged("impossible state")
			case s == reading || s == held: // it was never installed
				p.set(i, absent)
			}
		}
	}
	return rs, nil
}

func (t *ledgerTable) checksum() uint32 {
	parts := t.parts[:t.count]
	if len(parts) == 0 {
		return 0
	}
	n := uintptr(len(parts)) * unsafe.Sizeof(parts[0])
	return crc32.Checksum(unsafe.Slice((*byte)(unsafe.Pointer(&parts[0])), n), castagnoli)
}

// commit notes where the regions are now, after so many messages.
func (l *ledger) commit(rs regions, applied int) {
	if len(rs) > maxParts {
		l.head.full.Store(1)
		return
	}
	next := 1 - l.head.active.Load()
	t := &l.tables[next]
	t.count = uint32(len(rs))
	for i, r := range rs {
		p := ledgerPart{start: uint64(r.Start), length: r.Len, first: r.first, home: uint32(r.home)}
		if r.source == nil {
			p.zeros = 1
		}
		t.parts[i] = p
	}
	t.sum = t.checksum()
	t.applied.Store(uint32(applied))
	l.head.active.Store(next)
}

// begin ends what newLedger has begun.
func (l *ledger) begin(rs regions) {
	l.commit(rs, 0)
	l.head.magic.Store(ledgerMagic)
}

// apply notes that msgs[i], an event, was applied.
func (l *ledger) apply(i int, rs regions) {
	switch l.head.msgs[i].Event() {
	case uffd.EventRemap, uffd.EventUnmap:
		l.commit(rs, i+1)
	default:
		l.tables[l.head.active.Load()].applied.Store(uint32(i + 1))
	}
}

// clear makes room for the next messages. All events are applied.
func (l *ledger) clear() {
	applied := &l.tables[l.head.active.Load()].applied
	clear(l.head.msgs[:])
	applied.Store(0)
}

// settle says that pages are being mapped whose contents are written. Should the
// pager die, their process may have changed them already: they must not be
// written again.
func (l *ledger) settle(r *region, first, n uint64) {
	s := &l.head.settling
	s.home, s.first = uint64(r.home), r.first+first
	s.n.Store(n)
}

func (l *ledger) settled() { l.head.settling.n.Store(0) }

// recover brings what a dead pager has left in order, and returns the regions.
func (l *ledger) recover(homes []Region) (regions, error) {
	rs, err := l.regions(homes)
	if err != nil {
		return nil, err
	}
	if s := &l.head.settling; s.n.Load() > 0 {
		if s.home >= uint64(len(homes)) {
			return nil, fmt.Errorf("it is damaged: no such region: %w", syscall.EINVAL)
		}
		pages := homes[s.home].Range.Len / uint64(homes[s.home].PageSize)
		if n := s.n.Load(); s.first > pages || n > pages-s.first {
			return nil, fmt.Errorf("it is damaged: no such pages: %w", syscall.EINVAL)
		}
		(&region{states: l.states[s.home]}).filled(s.first, s.n.Load())
		l.settled()
	}
	// What was read and not yet applied.
	for i := int(l.tables[l.head.active.Load()].applied.Load()); i < len(l.head.msgs); i++ {
		m := &l.head.msgs[i]
		if m.Event() == uffd.EventFork {
			l.lost++
		}
		rs.apply(m)
		l.apply(i, rs)
	}
	l.clear()
	l.lost += int(l.head.children.Swap(0))
	return rs, nil
}
