package main

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/pager"
)

// encode returns an image file.
func encode(t testing.TB, magic uint32, records ...proto.Message) []byte {
	t.Helper()
	b := binary.LittleEndian.AppendUint32(nil, imageMagic)
	b = binary.LittleEndian.AppendUint32(b, magic)
	for _, r := range records {
		record, err := proto.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		b = append(binary.LittleEndian.AppendUint32(b, uint32(len(record))), record...)
	}
	return b
}

func head(id uint32) proto.Message { return &pagemap.PagemapHead{PagesId: proto.Uint32(id)} }

// pages is an entry of a pagemap; addr is in pages, too.
func entry(addr, pages uint64, flags uint32) proto.Message {
	return &pagemap.PagemapEntry{Vaddr: proto.Uint64(addr * pageSize), CompatNrPages: proto.Uint32(uint32(pages)),
		NrPages: proto.Uint64(pages), Flags: proto.Uint32(flags)}
}

func mapping(start, end uint64, flags uint32) *vma.VmaEntry {
	return &vma.VmaEntry{Start: proto.Uint64(start * pageSize), End: proto.Uint64(end * pageSize), Pgoff: proto.Uint64(0),
		Shmid: proto.Uint64(0), Prot: proto.Uint32(3), Flags: proto.Uint32(flags), Status: proto.Uint32(1), Fd: proto.Int64(-1)}
}

func mappings(vmas ...*vma.VmaEntry) proto.Message {
	zero := proto.Uint64(0)
	return &mm.MmEntry{MmStartCode: zero, MmEndCode: zero, MmStartData: zero, MmEndData: zero, MmStartStack: zero, MmStartBrk: zero,
		MmBrk: zero, MmArgStart: zero, MmArgEnd: zero, MmEnvStart: zero, MmEnvEnd: zero, ExeFileId: proto.Uint32(0), Vmas: vmas}
}

const anonymous = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS

// directory makes a directory of images of task 1, with numbered pages.
func directory(t testing.TB, pagemap []proto.Message, pages int, vmas ...*vma.VmaEntry) string {
	dir := t.TempDir()
	contents := make([]byte, uint64(pages)*pageSize)
	for i := range pages {
		contents[uint64(i)*pageSize] = byte(i + 1)
	}
	for name, b := range map[string][]byte{
		"pagemap-1.img": encode(t, pagemapMagic, pagemap...),
		"pages-5.img":   contents,
		"mm-1.img":      encode(t, mmMagic, mappings(vmas...)),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestRegions(t *testing.T) {
	parent := directory(t, []proto.Message{head(5), entry(100, 3, present), entry(200, 10, present|lazy)}, 13)
	dir := directory(t, []proto.Message{
		head(5),
		entry(90, 2, present),        // not ours, but before ours in the file
		entry(100, 4, present|lazy),  // in two mappings
		entry(201, 2, inParent|lazy), // in the middle of an extent
		entry(203, 1, inParent),      // restore reads it
		entry(204, 1, present|lazy),  //
	}, 7, mapping(90, 102, anonymous), mapping(102, 110, anonymous), mapping(200, 210, anonymous|unix.MAP_GROWSDOWN))
	if err := os.Symlink(parent, filepath.Join(dir, "parent")); err != nil {
		t.Fatal(err)
	}
	regions, err := lazyRegions(dir, 1)
	if err != nil {
		t.Fatal(err)
	}
	want := []struct {
		addr, pages uint64
		first       byte
	}{{100, 2, 3}, {102, 2, 5}, {201, 2, 5}, {204, 1, 7}}
	if len(regions) != len(want) {
		t.Fatalf("%d regions, want %d", len(regions), len(want))
	}
	for i, w := range want {
		checkRegion(t, regions[i], w.addr, w.pages, w.first)
	}
}

func checkRegion(t *testing.T, r pager.Region, addr, pages uint64, first byte) {
	t.Helper()
	if want := (uffd.Range{Start: uffd.Addr(addr * pageSize), Len: pages * pageSize}); r.Range != want {
		t.Errorf("region %v, want %v", r.Range, want)
	}
	var b [1]byte
	if _, err := r.Source.ReadAt(t.Context(), b[:], r.Offset); err != nil || b[0] != first {
		t.Errorf("region %v holds %d, %v, want %d", r.Range, b[0], err, first)
	}
}

func TestBadImages(t *testing.T) {
	all := mapping(0, 1000, anonymous)
	for _, test := range []struct {
		name, want string
		pagemap    []proto.Message
		pages      int
		mapping    *vma.VmaEntry
	}{
		{"empty", "empty", nil, 0, all},
		{"truncated pages", "should have", []proto.Message{head(5), entry(1, 2, present|lazy)}, 1, all},
		{"no pages file", "pages-6.img", []proto.Message{head(6), entry(1, 2, present|lazy)}, 2, all},
		{"unknown flag", "unknown flags", []proto.Message{head(5), entry(1, 1, present|8)}, 1, all},
		{"no flag", "unknown flags", []proto.Message{head(5), entry(1, 1, 0)}, 1, all},
		{"both here and in the parent", "unknown flags", []proto.Message{head(5), entry(1, 1, present|inParent)}, 1, all},
		{"left behind", "--page-server", []proto.Message{head(5), entry(1, 1, lazy)}, 0, all},
		{"no parent", "parent", []proto.Message{head(5), entry(1, 1, inParent|lazy)}, 0, all},
		{"order", "come after", []proto.Message{head(5), entry(2, 1, present), entry(1, 1, present)}, 2, all},
		{"overlap", "come after", []proto.Message{head(5), entry(1, 2, present), entry(2, 1, present)}, 3, all},
		{"no mapping", "no mapping", []proto.Message{head(5), entry(1000, 1, present|lazy)}, 1, all},
		{"half a mapping", "no mapping", []proto.Message{head(5), entry(999, 2, present|lazy)}, 2, all},
		{"shared", "cannot be", []proto.Message{head(5), entry(1, 1, present|lazy)}, 1, mapping(0, 9, unix.MAP_SHARED|unix.MAP_ANONYMOUS)},
		{"file", "cannot be", []proto.Message{head(5), entry(1, 1, present|lazy)}, 1, mapping(0, 9, unix.MAP_PRIVATE)},
		{"locked", "cannot be", []proto.Message{head(5), entry(1, 1, present|lazy)}, 1, mapping(0, 9, anonymous|unix.MAP_LOCKED)},
		{"no page", "bad entry", []proto.Message{head(5), entry(1, 0, present)}, 1, all},
		{"wraps", "bad entry", []proto.Message{head(5), entry(1<<52-1, 2, present)}, 2, all},
		{"huge", "bad entry", []proto.Message{head(5), entry(1, 1<<60, present)}, 2, all},
		{"empty mapping", "bad mapping", []proto.Message{head(5), entry(1, 1, present)}, 1, mapping(3, 3, anonymous)},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := lazyRegions(directory(t, test.pagemap, test.pages, test.mapping), 1)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want an error with %q", err, test.want)
			}
		})
	}
	t.Run("circle", func(t *testing.T) {
		dir := directory(t, []proto.Message{head(5), entry(1, 1, inParent|lazy)}, 0, all)
		if err := os.Symlink(".", filepath.Join(dir, "parent")); err != nil {
			t.Fatal(err)
		}
		if _, err := lazyRegions(dir, 1); err == nil {
			t.Error("no error")
		}
	})
}

// Whatever a pagemap says, it is refused, or makes extents that hold together.
func FuzzPagemap(f *testing.F) {
	f.Add(encode(f, pagemapMagic, head(5), entry(1, 2, present|lazy), entry(7, 2, inParent)))
	f.Add(encode(f, pagemapMagic))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		name := filepath.Join(dir, "pagemap-"+strconv.Itoa(os.Getpid())+".img")
		if err := os.WriteFile(name, b, 0o644); err != nil {
			t.Fatal(err)
		}
		extents, _, err := readPagemap(dir, int32(os.Getpid()))
		if err != nil {
			return
		}
		last, offset := uint64(0), int64(0)
		for _, e := range extents {
			if e.start < last || e.end <= e.start || e.end%pageSize != 0 || e.offset < 0 || e.flags&present != 0 && e.offset != offset {
				t.Fatalf("%#v", extents)
			}
			if last = e.end; e.flags&present != 0 {
				offset += int64(e.end - e.start)
			}
		}
	})
}

func TestRecords(t *testing.T) {
	good := encode(t, pagemapMagic, head(5))
	ignore := func([]byte) error { return nil }
	for n := range len(good) {
		if err := readRecords(bytes.NewReader(good[:n]), pagemapMagic, ignore); (err == nil) != (n == 8) {
			t.Errorf("the first %d bytes: %v", n, err)
		}
	}
	if err := readRecords(bytes.NewReader(good), mmMagic, ignore); err == nil {
		t.Error("an image of another kind was accepted")
	}
	long := binary.LittleEndian.AppendUint32(good[:8:8], maxRecord+1)
	if err := readRecords(bytes.NewReader(long), pagemapMagic, ignore); err == nil {
		t.Error("a record without limit was accepted")
	}
}
