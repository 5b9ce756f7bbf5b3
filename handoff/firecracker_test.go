package handoff

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/go-uffd/uffd"
)

func region(start uffd.Addr, length uint64, offset int64, pageSize int) Region {
	return Region{uffd.Range{Start: start, Len: length}, offset, pageSize}
}

// firecrackerMessages has a message of each version, of memory of 0x6000 bytes or
// 4 MiB.
var firecrackerMessages = []struct {
	name, message string
	want          []Region
}{
	{"1.1", `[{"base_host_virt_addr":140737488289792,"size":8192,"offset":0},` +
		`{"base_host_virt_addr":140737488306176,"size":16384,"offset":8192}]`,
		[]Region{region(0x7fffffff0000, 0x2000, 0, 4096), region(0x7fffffff4000, 0x4000, 0x2000, 4096)}},
	{"1.7", `[{"base_host_virt_addr":4194304,"size":4194304,"offset":0,"page_size_kib":2097152}]`,
		[]Region{region(0x400000, 0x400000, 0, 2<<20)}},
	{"1.12", `[{"base_host_virt_addr":4194304,"size":4194304,"offset":0,"page_size":2097152,"page_size_kib":2097152}]`,
		[]Region{region(0x400000, 0x400000, 0, 2<<20)}},
	{"page_size first", `[{"base_host_virt_addr":4194304,"size":4096,"offset":0,"page_size":4096,"page_size_kib":2097152}]`,
		[]Region{region(0x400000, 4096, 0, 4096)}},
	{"development", `[{"base_host_virt_addr":65536,"size":4096,"offset":4096,"page_size":4096,"page_size_kib":4096,` +
		`"gpa_start":4294967296,"is_guest_memfd":false,"unheard_of":{"a":[1,"]"]}}]`,
		[]Region{region(0x10000, 4096, 4096, 4096)}},
	{"spaced", " [ { \"size\" : 4096 ,\n\"offset\":0, \"base_host_virt_addr\":65536 } ]\r\n ",
		[]Region{region(0x10000, 4096, 0, 4096)}},
	{"downwards", `[{"base_host_virt_addr":69632,"size":4096,"offset":0},{"base_host_virt_addr":65536,"size":4096,"offset":4096}]`,
		[]Region{region(0x11000, 4096, 0, 4096), region(0x10000, 4096, 4096, 4096)}},
}

func TestDecodeFirecracker(t *testing.T) {
	for _, m := range firecrackerMessages {
		t.Run(m.name, func(t *testing.T) {
			size := int64(0x6000)
			if m.want[0].PageSize > 4096 {
				size = 4 << 20
			}
			for _, read := range []func(io.Reader) io.Reader{
				func(r io.Reader) io.Reader { return r },
				iotest.OneByteReader,
				iotest.DataErrReader,
			} {
				got, err := decodeFirecracker(read(strings.NewReader(m.message)), size)
				if err != nil || !slices.Equal(got, m.want) {
					t.Errorf("got %v, %v, want %v", got, err, m.want)
				}
			}
			if _, err := decodeFirecracker(strings.NewReader(m.message), size/2); m.want[0].PageSize > 4096 && err == nil {
				t.Errorf("a memory file of half the size was accepted")
			}
			for i := range strings.TrimRight(m.message, " \r\n") {
				if got, err := decodeFirecracker(strings.NewReader(m.message[:i]), size); err == nil {
					t.Errorf("cut after %d bytes: got %v", i, got)
				}
			}
		})
	}
}

// TestDecodeFirecrackerStopsReading checks that a complete message is not waited
// for any longer.
func TestDecodeFirecrackerStopsReading(t *testing.T) {
	for _, m := range firecrackerMessages {
		text := strings.TrimSpace(m.message)
		_, err := decodeFirecracker(io.MultiReader(strings.NewReader(text), iotest.ErrReader(io.ErrNoProgress)), math.MaxInt64)
		if err != nil {
			t.Errorf("%s: %v", m.name, err)
		}
	}
}

func TestDecodeFirecrackerRefuses(t *testing.T) {
	const one = `{"base_host_virt_addr":65536,"size":4096,"offset":0}`
	raw := func(base, size, offset, page uint64) string {
		return fmt.Sprintf(`{"base_host_virt_addr":%d,"size":%d,"offset":%d,"page_size":%d}`, base, size, offset, page)
	}
	for _, test := range []struct {
		name, message, want string
		memory              int64
	}{
		{"empty", "[]", "no regions", 1 << 20},
		{"null", "null", "starts with <nil>", 1 << 20},
		{"null region", "[null]", "is missing", 1 << 20},
		{"object", one, "starts with {", 1 << 20},
		{"number", "[1]", "cannot unmarshal number", 1 << 20},
		{"HTTP", "GET / HTTP/1.1\r\n\r\n", "invalid character", 1 << 20},
		{"not closed", "[" + one + "}", "invalid character", 1 << 20},
		{"two messages", "[" + one + "][" + one + "]", `"[{\"base_host`, 1 << 20},
		{"negative", `[{"base_host_virt_addr":-4096,"size":4096,"offset":0}]`, "cannot unmarshal", 1 << 20},
		{"above 64 bits", `[{"base_host_virt_addr":18446744073709551616,"size":4096,"offset":0}]`, "cannot unmarshal", 1 << 20},
		{"fraction", `[{"base_host_virt_addr":65536.5,"size":4096,"offset":0}]`, "cannot unmarshal", 1 << 20},
		{"text", `[{"base_host_virt_addr":"65536","size":4096,"offset":0}]`, "cannot unmarshal", 1 << 20},
		{"no base", `[{"size":4096,"offset":0}]`, "is missing", 1 << 20},
		{"no size", `[{"base_host_virt_addr":65536,"offset":0}]`, "is missing", 1 << 20},
		{"no offset", `[{"base_host_virt_addr":65536,"size":4096}]`, "is missing", 1 << 20},
		{"no bytes", "[" + raw(65536, 0, 0, 4096) + "]", "empty", 1 << 20},
		{"unaligned address", "[" + raw(65537, 4096, 0, 4096) + "]", "whole pages of 4096", 1 << 20},
		{"unaligned size", "[" + raw(65536, 4095, 0, 4096) + "]", "whole pages of 4096", 1 << 20},
		{"unaligned offset", "[" + raw(65536, 4096, 1, 4096) + "]", "offset, 1", 1 << 20},
		{"unaligned huge page", "[" + raw(65536, 2<<20, 0, 2<<20) + "]", "whole pages of 2097152", 1 << 30},
		{"unaligned huge offset", "[" + raw(2<<20, 2<<20, 4096, 2<<20) + "]", "offset, 4096", 1 << 30},
		{"page size 0", "[" + raw(65536, 4096, 0, 0) + "]", "0 bytes is not the size", 1 << 20},
		{"page size in KiB", "[" + raw(65536, 4096, 0, 4) + "]", "4 bytes is not the size", 1 << 20},
		{"page size 12288", "[" + raw(12288, 12288, 0, 12288) + "]", "12288 bytes is not the size", 1 << 20},
		{"page size 2 GiB", "[" + raw(0, 1<<31, 0, 1<<31) + "]", "2147483648 bytes is not the size", 1 << 40},
		{"page size 2^63", "[" + raw(0, 4096, 0, 1<<63) + "]", "is not the size", 1 << 40},
		{"wraps", "[" + raw(1<<64-4096, 8192, 0, 4096) + "]", "wraps", 1 << 40},
		{"up to the end", "[" + raw(1<<64-4096, 4096, 0, 4096) + "]", "wraps", 1 << 40},
		{"huge", "[" + raw(4096, 1<<64-8192, 0, 4096) + "]", "outside of the memory file", 1 << 40},
		{"offset above 63 bits", "[" + raw(65536, 4096, 1<<63, 4096) + "]", "its offset is", math.MaxInt64},
		{"offset and size wrap", "[" + raw(65536, 8192, 1<<63-4096, 4096) + "]", "outside of the memory file", math.MaxInt64},
		{"behind the file", "[" + raw(65536, 4096, 4096, 4096) + "]", "outside of the memory file", 4096},
		{"partly behind the file", "[" + raw(65536, 8192, 0, 4096) + "]", "outside of the memory file", 4097},
		{"no file", "[" + one + "]", "outside of the memory file", -1},
		{"same", "[" + one + "," + one + "]", "overlap", 1 << 20},
		{"overlap", "[" + raw(65536, 4096, 0, 4096) + "," + raw(32768, 36864, 0, 4096) + "]", "overlap", 1 << 20},
		{"inside", "[" + raw(65536, 32768, 0, 4096) + "," + raw(1<<30, 4096, 0, 4096) + "," + raw(69632, 4096, 0, 4096) + "]", "overlap", 1 << 20},
		{"too many", "[" + one + strings.Repeat(","+one, maxRegions) + "]", "more than 4096 regions", 1 << 20},
		{"too long", "[" + strings.Repeat(" ", maxMessage) + one + "]", "longer than 1048576 bytes", 1 << 20},
		{"endless name", `[{"` + strings.Repeat("x", maxMessage), "longer than 1048576 bytes", 1 << 20},
		{"deep", "[" + strings.Repeat(`{"x":`, 20000), "exceeded max depth", 1 << 20},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := decodeFirecracker(strings.NewReader(test.message), test.memory)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, %v, want an error with %q", got, err, test.want)
			}
		})
	}
}

func TestDecodeFirecrackerLimits(t *testing.T) {
	var list []string
	for i := range maxRegions {
		list = append(list, fmt.Sprintf(`{"base_host_virt_addr":%d,"size":4096,"offset":%d}`, (i+1)<<16, i<<12))
	}
	message := "[" + strings.Join(list, ",") + "]"
	message = message[:len(message)-1] + strings.Repeat(" ", maxMessage-len(message)) + "]"
	got, err := decodeFirecracker(strings.NewReader(message), maxRegions<<12)
	if err != nil || len(got) != maxRegions {
		t.Errorf("the largest message gives %d regions, %v", len(got), err)
	}
}

// sound fails if regions break a promise.
func sound(t *testing.T, regions []Region, memorySize int64) {
	if len(regions) == 0 || len(regions) > maxRegions {
		t.Fatalf("%d regions", len(regions))
	}
	for i, r := range regions {
		page := uint64(r.PageSize)
		if page == 0 {
			page = 4096
		}
		start, length, offset := uint64(r.Range.Start), r.Range.Len, uint64(r.Offset)
		last := start + length - 1
		if length == 0 || last < start || last == math.MaxUint64 || start%page != 0 || length%page != 0 || offset%page != 0 {
			t.Fatalf("region %+v is malformed", r)
		}
		if r.Offset < 0 || r.Offset+int64(length) < r.Offset || r.Offset+int64(length) > memorySize {
			t.Fatalf("region %+v lies outside of a file of %d bytes", r, memorySize)
		}
		for _, other := range regions[:i] {
			if start < uint64(other.Range.End()) && uint64(other.Range.Start) <= last {
				t.Fatalf("regions %+v and %+v overlap", r, other)
			}
		}
	}
}

func FuzzFirecracker(f *testing.F) {
	for _, m := range firecrackerMessages {
		f.Add([]byte(m.message), int64(4<<20))
	}
	f.Fuzz(func(t *testing.T, message []byte, memorySize int64) {
		got, err := decodeFirecracker(strings.NewReader(string(message)), memorySize)
		if err != nil {
			return
		}
		sound(t, got, memorySize)
		if !json.Valid(message) {
			t.Fatalf("%q is not JSON", message)
		}
		var count []json.RawMessage
		if err := json.Unmarshal(message, &count); err != nil || len(count) != len(got) {
			t.Fatalf("%d regions of a list of %d, %v", len(got), len(count), err)
		}
	})
}
