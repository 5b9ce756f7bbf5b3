package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/pager"
)

// TestRecordAndReplay has a second handler bring in ahead what the microVM of a
// first one touched, and nothing else.
func TestRecordAndReplay(t *testing.T) {
	const pages = 1024
	mem := snapshot(t, pages, os.Getpagesize())
	identity, err := identityOf(mem)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "record")
	first := startWith(t, func(h *handler) { h.identity, h.record = identity, file }, mem)
	g := restore(t, uffdtest.Anon, pages, version1_12)
	touched := []int{700, 3, 4, 5, 900, 301}
	for _, i := range touched {
		g.holds(t, i, content(i))
	}
	other := restore(t, uffdtest.Anon, pages, version1_12) // is not recorded
	other.holds(t, 512, content(512))
	other.Kill()
	g.Kill()
	eventually(t, "the record is written", func() bool { return strings.Contains(first.log.String(), "recorded 6 pages") })

	record, err := readRecord(file)
	if err != nil {
		t.Fatal(err)
	}
	second := startWith(t, func(h *handler) { h.identity, h.replay = identity, record }, mem)
	g = restore(t, uffdtest.Anon, pages, version1_12)
	eventually(t, "the pages have come", func() bool { return second.pager.Stats().Replayed == uint64(len(touched)) })
	for _, i := range touched {
		if g.Pagemap(g.page(i).Start)&uffdtest.PagemapPresent == 0 {
			t.Errorf("page %d has not come", i)
		}
	}
	g.intact(t, nil)
}

// TestForeignRecord serves all the same.
func TestForeignRecord(t *testing.T) {
	const pages = 16
	mem := snapshot(t, pages, os.Getpagesize())
	file := filepath.Join(t.TempDir(), "record")
	first := startWith(t, func(h *handler) { h.identity, h.record = "another", file }, mem)
	g := restore(t, uffdtest.Anon, pages, version1_12)
	g.holds(t, 1, content(1))
	g.Kill()
	eventually(t, "the record is written", func() bool { return strings.Contains(first.log.String(), "recorded") })
	record, err := readRecord(file)
	if err != nil {
		t.Fatal(err)
	}
	second := startWith(t, func(h *handler) { h.identity, h.replay = "this", record }, mem)
	restore(t, uffdtest.Anon, pages, version1_12).intact(t, nil)
	eventually(t, "it is reported", func() bool { return strings.Contains(second.log.String(), "other memory") })

	if err := os.WriteFile(file, []byte("no record"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readRecord(file); !errors.Is(err, pager.ErrRecordCorrupt) {
		t.Errorf("a damaged record: %v", err)
	}
}
