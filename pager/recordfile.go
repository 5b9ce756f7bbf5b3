package pager

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// A record is, in little endian, and with numbers in the format of
// binary.AppendUvarint,
//
//	"uffdrec\n", version (4 bytes),
//	length of the identity, identity,
//	number of regions, of each: length, page size,
//	number of runs, of each: region, distance of its first page from the end of
//	the previous run (as of binary.AppendVarint), number of pages,
//	CRC-32C of all before (4 bytes).
const (
	recordMagic   = "uffdrec\n"
	recordVersion = 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// MarshalBinary returns the record as it is kept in a file.
func (r *Record) MarshalBinary() ([]byte, error) {
	b := binary.LittleEndian.AppendUint32([]byte(recordMagic), recordVersion)
	b = binary.AppendUvarint(b, uint64(len(r.identity)))
	b = append(b, r.identity...)
	b = binary.AppendUvarint(b, uint64(len(r.shapes)))
	for _, s := range r.shapes {
		b = binary.AppendUvarint(b, s.length)
		b = binary.AppendUvarint(b, s.pageSize)
	}
	b = binary.AppendUvarint(b, uint64(len(r.runs)))
	end := uint64(0)
	for _, run := range r.runs {
		b = binary.AppendUvarint(b, uint64(run.region))
		b = binary.AppendVarint(b, int64(run.first-end))
		b = binary.AppendUvarint(b, run.n)
		end = run.first + run.n
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli)), nil
}

// UnmarshalBinary decodes what MarshalBinary returned. The error of anything else
// is ErrRecordCorrupt or ErrRecordVersion; r is what it was then.
func (r *Record) UnmarshalBinary(data []byte) error {
	head := len(recordMagic)
	if len(data) < head+4 || string(data[:head]) != recordMagic {
		return fmt.Errorf("%w: it does not begin like one", ErrRecordCorrupt)
	}
	if v := binary.LittleEndian.Uint32(data[head:]); v != recordVersion {
		if v > recordVersion {
			return fmt.Errorf("%w: %d", ErrRecordVersion, v)
		}
		return fmt.Errorf("%w: there is no version %d", ErrRecordCorrupt, v)
	}
	body, sum := data[:max(len(data)-4, 0)], uint32(0)
	if len(body) >= head+4 {
		sum = binary.LittleEndian.Uint32(data[len(body):])
	}
	if len(body) < head+4 || crc32.Checksum(body, castagnoli) != sum {
		return fmt.Errorf("%w: wrong checksum", ErrRecordCorrupt)
	}
	d := decoder{rest: body[head+4:]}
	decoded := d.record()
	if d.bad || len(d.rest) > 0 {
		return fmt.Errorf("%w: impossible contents", ErrRecordCorrupt)
	}
	*r = decoded
	return nil
}

// A decoder takes a record apart. What it makes is not larger than a small
// multiple of what it reads.
type decoder struct {
	rest []byte
	bad  bool
}

func (d *decoder) record() (r Record) {
	r.identity = string(d.bytes(d.uvarint()))
	for range d.count(2) {
		s := shape{d.uvarint(), d.uvarint()}
		if s.pageSize == 0 || s.length%s.pageSize != 0 {
			d.bad = true
			return
		}
		r.shapes = append(r.shapes, s)
	}
	end := uint64(0)
	for range d.count(3) {
		region, distance, n := d.uvarint(), d.varint(), d.uvarint()
		first := end + uint64(distance)
		if d.bad || region >= uint64(len(r.shapes)) {
			d.bad = true
			return
		}
		pages := r.shapes[region].length / r.shapes[region].pageSize
		if n == 0 || first >= pages || n > pages-first {
			d.bad = true
			return
		}
		r.runs = append(r.runs, run{int(region), first, n})
		end = first + n
	}
	return r
}

// count returns the number of things to come, each of at least size bytes.
func (d *decoder) count(size int) int {
	n := d.uvarint()
	if n > uint64(len(d.rest)/size) {
		d.bad = true
		return 0
	}
	return int(n)
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.rest)
	return number(d, v, n)
}

func (d *decoder) varint() int64 {
	v, n := binary.Varint(d.rest)
	return number(d, v, n)
}

func number[T int64 | uint64](d *decoder, v T, n int) T {
	if n <= 0 {
		d.bad, d.rest = true, nil
		return 0
	}
	d.rest = d.rest[n:]
	return v
}

func (d *decoder) bytes(n uint64) []byte {
	if n > uint64(len(d.rest)) {
		d.bad, d.rest = true, nil
		return nil
	}
	b := d.rest[:n]
	d.rest = d.rest[n:]
	return b
}
