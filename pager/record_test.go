package pager

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"reflect"
	"testing"
)

var someRecord = &Record{
	identity: "snapshot 7",
	shapes:   []shape{{1 << 20, 4096}, {1 << 30, 2 << 20}},
	runs:     []run{{0, 255, 1}, {1, 0, 512}, {0, 3, 7}, {0, 0, 1}},
}

func TestRecordFile(t *testing.T) {
	for _, want := range []*Record{someRecord, {identity: "", shapes: []shape{{4096, 4096}}}, {}} {
		b, err := want.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		var got Record
		if err := got.UnmarshalBinary(b); err != nil || !reflect.DeepEqual(&got, want) {
			t.Errorf("%+v, %v; want %+v", got, err, want)
		}
	}
	if n := someRecord.Pages(); n != 521 {
		t.Errorf("%d pages, want 521", n)
	}
}

// A damaged record is an error, wherever the damage is, and changes nothing.
func TestRecordDamaged(t *testing.T) {
	b, _ := someRecord.MarshalBinary()
	refuses := func(what string, damaged []byte, want error) {
		t.Helper()
		r := Record{identity: "as it was"}
		if err := r.UnmarshalBinary(damaged); !errors.Is(err, want) || r.identity != "as it was" {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	for i := range b {
		refuses("cut short", b[:i], ErrRecordCorrupt)
		for bit := range 8 {
			damaged := append([]byte(nil), b...)
			damaged[i] ^= 1 << bit
			want := ErrRecordCorrupt
			if v := binary.LittleEndian.Uint32(damaged[8:]); v > recordVersion {
				want = ErrRecordVersion
			}
			refuses("flipped bit", damaged, want)
		}
	}
	refuses("longer", append(b[:len(b):len(b)], 0), ErrRecordCorrupt)
	later := signed(binary.LittleEndian.AppendUint32([]byte(recordMagic), recordVersion+1))
	refuses("later version", later, ErrRecordVersion)

	// What no checksum finds.
	encode := func(numbers ...uint64) []byte {
		b := binary.LittleEndian.AppendUint32([]byte(recordMagic), recordVersion)
		for _, n := range numbers {
			b = binary.AppendUvarint(b, n)
		}
		return signed(b)
	}
	for what, b := range map[string][]byte{
		"no numbers":       encode(),
		"long identity":    encode(1 << 60),
		"many regions":     encode(0, 1<<60),
		"no page size":     encode(0, 1, 4096, 0, 0),
		"odd length":       encode(0, 1, 4097, 4096, 0),
		"many runs":        encode(0, 1, 4096, 4096, 1<<60),
		"no such region":   encode(0, 1, 4096, 4096, 1, 1, 0, 1),
		"empty run":        encode(0, 1, 4096, 4096, 1, 0, 0, 0),
		"long run":         encode(0, 1, 4096, 4096, 1, 0, 0, 2),
		"endless run":      encode(0, 1, 4096, 4096, 1, 0, 0, 1<<64-1),
		"run before all":   encode(0, 1, 4096, 4096, 1, 0, 1, 1), // distance -1
		"run behind all":   encode(0, 1, 4096, 4096, 1, 0, 2, 1), // distance 1
		"something behind": encode(0, 0, 0, 0),
		"not a number":     signed(append([]byte(recordMagic), 1, 0, 0, 0, 0x80, 0x80)),
	} {
		refuses(what, b, ErrRecordCorrupt)
	}
}

func signed(b []byte) []byte {
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// What decodes has its pages within its regions, and encodes to what decodes to
// the same.
func FuzzRecord(f *testing.F) {
	for _, r := range []*Record{someRecord, {}} {
		b, _ := r.MarshalBinary()
		f.Add(b[:len(b)-4])
	}
	f.Fuzz(func(t *testing.T, unsigned []byte) {
		var r, again Record
		if err := r.UnmarshalBinary(signed(unsigned)); err != nil {
			return
		}
		for _, run := range r.runs {
			s := r.shapes[run.region]
			if run.n == 0 || run.first+run.n > s.length/s.pageSize || run.first+run.n < run.first {
				t.Errorf("%+v in %+v", run, s)
			}
		}
		b, _ := r.MarshalBinary()
		if err := again.UnmarshalBinary(b); err != nil || !reflect.DeepEqual(again, r) {
			t.Errorf("%+v became %+v, %v", r, again, err)
		}
	})
}

// The recorder keeps each page once, in order, and does not allocate for each.
func TestRecorder(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	const pages = 1 << 16
	c := &Client{homes: []Region{{PageSize: 4096}, {PageSize: 4096}}}
	for i := range c.homes {
		c.homes[i].Range.Len = pages * 4096
	}
	if c.StopRecording() != nil {
		t.Error("there is a record of nothing")
	}
	c.StartRecording("x")
	type page struct {
		region int
		index  uint64
	}
	var want []page
	seen := make(map[page]bool)
	note := func() {
		p := page{random.IntN(2), random.Uint64N(pages)}
		for range 1 + random.IntN(3) {
			if p.index < pages {
				c.recorder.Load().note(p.region, p.index)
				if !seen[p] {
					seen[p] = true
					want = append(want, p)
				}
			}
			p.index++
		}
	}
	for range 30000 {
		note()
	}
	r := c.StopRecording()
	var got []page
	for _, run := range r.runs {
		for i := range run.n {
			got = append(got, page{run.region, run.first + i})
		}
	}
	if !reflect.DeepEqual(got, want) || r.Pages() != uint64(len(want)) {
		t.Errorf("%d pages, want %d, or others, or in another order", len(got), len(want))
	}

	c.StartRecording("y")
	next := uint64(0)
	if n := testing.AllocsPerRun(pages/3, func() {
		c.recorder.Load().note(0, next)
		next += 2
	}); n != 0 {
		t.Errorf("%v allocations for a page", n)
	}
}
