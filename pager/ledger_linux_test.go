package pager

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"reflect"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/source"
)

// event makes a message as the kernel does.
func event(kind uffd.Event, numbers ...uint64) (m uffd.Msg) {
	raw := (*[32]byte)(unsafe.Pointer(&m))
	raw[0] = byte(kind)
	for i, n := range numbers {
		binary.NativeEndian.PutUint64(raw[8+8*i:], n)
	}
	return m
}

func testHomes() []Region {
	return []Region{
		{Range: uffd.Range{Start: 0, Len: 8 << 12}, PageSize: 4096, Source: source.Zero(1 << 30)},
		{Range: uffd.Range{Start: 0x100000, Len: 3 << 12}, PageSize: 4096, Source: source.Zero(1 << 30), Offset: 4096,
			Memory: make([]byte, 3<<12), BeforeWrite: func(uffd.Range) {}},
	}
}

// attached are the regions of homes, before any event.
func attached(homes []Region, l *ledger) (rs regions) {
	for i, h := range homes {
		r := &region{Range: h.Range, pageSize: uint64(h.PageSize), source: h.Source, offset: h.Offset, memory: h.Memory,
			beforeWrite: h.BeforeWrite, home: i, states: newPages(h.Range.Len / uint64(h.PageSize))}
		if l != nil {
			r.states = l.states[i]
		}
		rs.insert(r)
	}
	return rs
}

func newTestLedger(t *testing.T, mem []byte, homes []Region) *ledger {
	t.Helper()
	l, err := newLedger(mem, homes)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// aligned returns a copy of b, or empty memory, where a ledger can be.
func aligned(n uint64, b []byte) []byte {
	words := make([]uint64, n/8)
	mem := unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), n)
	copy(mem, b)
	return mem
}

// A pageView is what a pager knows of every address.
type pageView struct {
	home      int
	source    int64 // -1: zeros
	state     state
	memory    int // offset in it
	protected bool
}

func view(homes []Region, rs regions) map[uffd.Addr]pageView {
	pages := make(map[uffd.Addr]pageView)
	for _, r := range rs {
		for i := range r.pages() {
			v := pageView{home: r.home, source: -1, protected: r.writeProtected()}
			if r.source != nil {
				v.source, v.state = r.sourceOffset(i), r.state(i)
			}
			if r.memory != nil {
				v.memory = int(uintptr(unsafe.Pointer(&r.memoryAt(i, 1)[0])) - uintptr(unsafe.Pointer(&homes[r.home].Memory[0])))
			}
			pages[r.page(i).Start] = v
		}
	}
	return pages
}

// Whenever a pager dies while it deals with events, its successor finds that all
// of them have happened, once.
func TestLedgerRecovers(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	homes := testHomes()
	_, _, _, size := ledgerLayout(homes)
	room := uint64(0x10000000) // no address is used twice
	page := func(n uint64) uint64 { return n << 12 }
	for range 100 {
		mem := aligned(size, nil)
		l := newTestLedger(t, mem, homes)
		rs := attached(homes, l)
		l.begin(rs)
		want := attached(homes, nil)

		// What a successor of a pager that dies now would know.
		check := func(when string) {
			t.Helper()
			successor := newTestLedger(t, aligned(size, mem), homes)
			got, err := successor.recover(homes)
			if err != nil {
				t.Fatalf("%s: %v", when, err)
			}
			if got, want := view(homes, got), view(homes, want); !reflect.DeepEqual(got, want) {
				t.Fatalf("%s: %v\nwant %v", when, got, want)
			}
			if again, err := newTestLedger(t, aligned(size, successor.mem), homes).recover(homes); err != nil ||
				!reflect.DeepEqual(view(homes, again), view(homes, got)) {
				t.Fatalf("%s: another successor: %v, %v", when, again, err)
			}
		}
		check("at first")
		for range 5 {
			n := 1 + random.IntN(4)
			for i := range n {
				var any *region
				if len(want) > 0 {
					any = want[random.IntN(len(want))]
				} else {
					break
				}
				first := random.Uint64N(any.pages())
				part := any.span(first, 1+random.Uint64N(any.pages()-first))
				m := event(uffd.EventPagefault, 0, uint64(part.Start))
				switch random.IntN(5) {
				case 0:
					m = event(uffd.EventRemove, uint64(part.Start), uint64(part.End()))
				case 1:
					m = event(uffd.EventUnmap, uint64(part.Start), uint64(part.End()))
				case 2, 3:
					m = event(uffd.EventRemap, uint64(part.Start), room, part.Len)
					room += page(64)
				}
				l.head.msgs[i] = m // the kernel does
				want.apply(&m)
			}
			check("after reading")
			for i := range n {
				m := &l.head.msgs[i]
				if m.Event() == uffd.EventPagefault {
					continue
				}
				rs.apply(m)
				check("after an event")
				l.apply(i, rs)
				check("after noting it")
			}
			for _, r := range rs { // faults are resolved
				if i := random.Uint64N(r.pages()); r.source != nil {
					r.filled(i, 1)
				}
			}
			want = nil
			for _, r := range rs {
				c := *r
				want.insert(&c)
			}
			want = want.clone()
			// The faults are after the events, so no event is applied to them again.
			check("after the faults")
			l.clear()
			check("at the end")
		}
	}
}

// What was being read or waited for has to be asked for again; what was being
// mapped is not written again.
func TestLedgerSettles(t *testing.T) {
	homes := testHomes()
	_, _, _, size := ledgerLayout(homes)
	l := newTestLedger(t, aligned(size, nil), homes)
	rs := attached(homes, l)
	l.begin(rs)
	for i, s := range []state{reading, held, present, removed, zeroed, poisoned, presentWoken, zeroedWoken} {
		rs[0].setState(uint64(i), s)
	}
	rs[1].setState(1, removed)
	l.settle(rs[1], 0, 2)
	l.head.children.Store(2)
	l.head.msgs[3] = event(uffd.EventFork)
	got, err := l.recover(homes)
	if err != nil {
		t.Fatal(err)
	}
	for i, s := range []state{absent, absent, present, removed, zeroed, poisoned, presentWoken, zeroedWoken} {
		if got[0].state(uint64(i)) != s {
			t.Errorf("page %d has state %d, want %d", i, got[0].state(uint64(i)), s)
		}
	}
	for i, s := range []state{present, zeroed, absent} {
		if got[1].state(uint64(i)) != s {
			t.Errorf("page %d of shared memory has state %d, want %d", i, got[1].state(uint64(i)), s)
		}
	}
	if l.lost != 3 {
		t.Errorf("%d children lost, want 3", l.lost)
	}
}

// A damaged ledger, one of a later version or of other regions is an error.
func TestLedgerRefuses(t *testing.T) {
	homes := testHomes()
	_, _, _, size := ledgerLayout(homes)
	good := aligned(size, nil)
	l := newTestLedger(t, good, homes)
	rs := attached(homes, l)
	l.begin(rs)
	rs.remap(uffd.Remap{From: 0x101000, To: 0x500000, Len: 1 << 12})
	l.commit(rs, 0)
	take := func(mem []byte, homes []Region) error {
		l, err := newLedger(mem, homes)
		if err == nil {
			_, err = l.recover(homes)
		}
		return err
	}
	if err := take(aligned(size, good), homes); err != nil {
		t.Fatalf("a good one: %v", err)
	}
	for name, damage := range map[string]func(l *ledger, t *ledgerTable){
		"magic":         func(l *ledger, _ *ledgerTable) { l.head.magic.Store(1) },
		"version":       func(l *ledger, _ *ledgerTable) { l.head.version++ },
		"regions":       func(l *ledger, _ *ledgerTable) { l.head.regions++ },
		"full":          func(l *ledger, _ *ledgerTable) { l.head.full.Store(1) },
		"active":        func(l *ledger, _ *ledgerTable) { l.head.active.Store(2) },
		"count":         func(_ *ledger, t *ledgerTable) { t.count = maxParts + 1 },
		"fewer":         func(_ *ledger, t *ledgerTable) { t.count-- },
		"applied":       func(_ *ledger, t *ledgerTable) { t.applied.Store(65) },
		"address":       func(_ *ledger, t *ledgerTable) { t.parts[0].start++ },
		"state":         func(l *ledger, _ *ledgerTable) { l.states[1].set(2, 15) },
		"settling home": func(l *ledger, _ *ledgerTable) { l.head.settling.n.Store(1); l.head.settling.home = 2 },
		"settling":      func(l *ledger, _ *ledgerTable) { l.head.settling.n.Store(1); l.head.settling.first = 8 },
		// With the right checksum.
		"home":     func(_ *ledger, t *ledgerTable) { t.parts[0].home = 2; t.sum = t.checksum() },
		"odd":      func(_ *ledger, t *ledgerTable) { t.parts[0].start++; t.sum = t.checksum() },
		"empty":    func(_ *ledger, t *ledgerTable) { t.parts[0].length = 0; t.sum = t.checksum() },
		"overlap":  func(_ *ledger, t *ledgerTable) { t.parts[1].start = 0; t.sum = t.checksum() },
		"overflow": func(_ *ledger, t *ledgerTable) { t.parts[3].length = 1<<64 - 4096; t.sum = t.checksum() },
		"beyond":   func(_ *ledger, t *ledgerTable) { t.parts[0].first = 1; t.sum = t.checksum() },
		"far away": func(_ *ledger, t *ledgerTable) { t.parts[0].first = 1 << 63; t.sum = t.checksum() },
		"zeros beyond memory": func(_ *ledger, t *ledgerTable) {
			t.parts[2].first, t.parts[2].zeros = 3, 1
			t.sum = t.checksum()
		},
	} {
		mem := aligned(size, good)
		l := newTestLedger(t, mem, homes)
		damage(l, &l.tables[l.head.active.Load()])
		if err := take(mem, homes); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	for name, change := range map[string]func(r *Region){
		"start":     func(r *Region) { r.Range.Start += 4096 },
		"offset":    func(r *Region) { r.Offset++ },
		"memory":    func(r *Region) { r.Memory = nil },
		"protected": func(r *Region) { r.BeforeWrite = nil },
	} {
		other := testHomes()
		change(&other[1])
		if err := take(aligned(size, good), other); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("another %s: %v, want EINVAL", name, err)
		}
	}
}

// Whatever is in a ledger, it is an error or makes sense.
func FuzzLedger(f *testing.F) {
	homes := testHomes()
	_, _, _, size := ledgerLayout(homes)
	mem := aligned(size, nil)
	l, err := newLedger(mem, homes)
	if err != nil {
		f.Fatal(err)
	}
	rs := attached(homes, l)
	l.begin(rs)
	rs.remap(uffd.Remap{From: 0x101000, To: 0x500000, Len: 1 << 12})
	l.commit(rs, 0)
	const partsLen = 8 * 32
	part := func(t *ledgerTable) []byte { return unsafe.Slice((*byte)(unsafe.Pointer(&t.parts)), partsLen) }
	f.Add(uint32(4), part(&l.tables[l.head.active.Load()]), []byte(nil))
	f.Add(uint32(2), part(&l.tables[0]), bytes.Repeat([]byte{0x14}, 96))
	f.Fuzz(func(t *testing.T, count uint32, parts, msgs []byte) {
		mem := aligned(size, mem)
		l := newTestLedger(t, mem, homes)
		table := &l.tables[l.head.active.Load()]
		copy(part(table), parts)
		table.count = min(count, maxParts)
		table.sum = table.checksum()
		for i := range min(len(msgs)/25, len(l.head.msgs)) {
			b := msgs[i*25:]
			u := func(i int) uint64 { return binary.LittleEndian.Uint64(b[1+8*i:]) & (1<<47 - 4096) }
			l.head.msgs[i] = event(uffd.Event(b[0]), u(0), u(1), u(2))
		}
		rs, err := l.recover(homes)
		if err != nil {
			return
		}
		for i, r := range rs {
			if i > 0 && rs[i-1].End() > r.Start {
				t.Errorf("%v and %v overlap", rs[i-1].Range, r.Range)
			}
			for k := range min(r.pages(), 100) {
				r.state(k)
				if r.memory != nil {
					r.memoryAt(k, 1)
				}
			}
		}
	})
}

// Two clients cannot use a state at a time, and what is no state is an error.
func TestOpenLedger(t *testing.T) {
	homes := testHomes()
	f, err := NewState()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l, err := openLedger(f, homes)
	if err != nil {
		t.Fatal(err)
	}
	l.begin(attached(homes, l))
	if _, err := openLedger(f, homes); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("a second time: %v, want EWOULDBLOCK", err)
	}
	if err := f.Truncate(0); !errors.Is(err, unix.EPERM) {
		t.Errorf("somebody could take the memory away: %v", err)
	}
	l.close()
	l, err = openLedger(f, homes)
	if err != nil || !l.adopted {
		t.Fatalf("after Close: %v", err)
	}
	l.close()
	if _, err := openLedger(f, homes[:1]); !errors.Is(err, unix.EINVAL) {
		t.Errorf("with other regions: %v, want EINVAL", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, err := openLedger(w, homes); err == nil {
		t.Error("a pipe is a state")
	}
}

// The pages of shared memory that the pager before has written are known.
func TestSharedFileAdopts(t *testing.T) {
	states := newPages(uint64(held) + 1)
	for s := range held + 1 {
		states.set(uint64(s), s)
	}
	f := &sharedFile{written: newPages(uint64(held) + 1)}
	f.adopt(states, uint64(held)+1)
	r := &region{}
	for s := range held + 1 {
		want := s == present || s == presentWoken || s == zeroed || s == zeroedWoken
		if f.has(r, uint64(s)) != want {
			t.Errorf("a page of state %d is written: %v, want %v", s, !want, want)
		}
	}
}
