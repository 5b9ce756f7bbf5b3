package uffd_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

// present returns which pages of mem, a mapping of the test process, are there.
func present(t *testing.T, mem []byte) (pages []bool) {
	for i := 0; i < len(mem); i += pageSize {
		entry := uffdtest.Pagemap(t, os.Getpid(), uffd.RangeOf(mem).Start+uffd.Addr(i))
		pages = append(pages, entry&uffdtest.PagemapPresent != 0)
	}
	return pages
}

func TestPopulate(t *testing.T) {
	for _, write := range []bool{false, true} {
		t.Run(fmt.Sprintf("write=%v", write), func(t *testing.T) {
			mem := mmap(t, 4)
			mem[pageSize] = 7
			// Part of a page stands for the page.
			if err := uffd.Populate(mem[pageSize-1:3*pageSize-5], write); err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprint(present(t, mem)); got != "[true true true false]" {
				t.Errorf("present: %s", got)
			}
			if mem[pageSize] != 7 {
				t.Errorf("content is %d, was 7", mem[pageSize])
			}
		})
	}
	if err := uffd.Populate(nil, true); err != nil {
		t.Errorf("nil: %v", err)
	}
}

func TestPopulateErrors(t *testing.T) {
	mem := mmap(t, 3)
	unix.Mprotect(mem[:pageSize], unix.PROT_READ)
	if err := uffd.Populate(mem[:pageSize], true); err == nil {
		t.Error("write to a read-only page succeeded")
	}
	if err := uffd.Populate(mem[:pageSize], false); err != nil {
		t.Error(err)
	}

	uffdtest.RequireUserFaults(t)
	f := open(t, &uffd.Config{Faults: uffd.UserFaults})
	register(t, f, uffd.RangeOf(mem[pageSize:]), uffd.RegisterMissing)
	for _, write := range []bool{false, true} {
		if err := uffd.Populate(mem[pageSize:], write); !errors.Is(err, unix.EFAULT) {
			t.Errorf("of user faults alone: %v, want EFAULT", err)
		}
	}
}

// Populate of memory that another goroutine serves.
func TestPopulateServed(t *testing.T) {
	uffdtest.RequireAllFaults(t)
	f := open(t, &uffd.Config{Faults: uffd.AllFaults})
	mem := mmap(t, 8)
	register(t, f, uffd.RangeOf(mem), uffd.RegisterMissing)
	go serveOwn(f, uffd.RangeOf(mem))
	if err := uffd.Populate(mem[:4*pageSize], false); err != nil {
		t.Fatal(err)
	}
	if err := uffd.Populate(mem[4*pageSize:], true); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(mem); i += pageSize {
		if want := byte(1 + i/pageSize); mem[i] != want || mem[i+pageSize-1] != want {
			t.Errorf("page %d holds %d, want %d", i/pageSize, mem[i], want)
		}
	}
}

// serveOwn fills page i of r with the byte i+1.
func serveOwn(f *uffd.File, r uffd.Range) error {
	src := make([]byte, pageSize)
	for {
		m, err := f.ReadMsg()
		if err != nil {
			return err
		}
		fault, _ := m.Pagefault()
		i := int(fault.Addr-r.Start) / pageSize
		for j := range src {
			src[j] = byte(i + 1)
		}
		_, err = f.Copy(r.Start+uffd.Addr(i*pageSize), src, 0)
		if errors.Is(err, unix.EEXIST) {
			err = f.Wake(uffd.Range{Start: r.Start + uffd.Addr(i*pageSize), Len: uint64(pageSize)})
		}
		if err != nil {
			return err
		}
	}
}

// populateRole touches memory that a goroutine of the same process serves, while
// the collector runs, on one P, and prints a line for each page.
func populateRole() error {
	access := os.Getenv("UFFD_TEST_ACCESS")
	f, err := uffd.New(&uffd.Config{Faults: uffd.AllFaults})
	if err != nil {
		return err
	}
	const pages = 64
	mem, err := unix.Mmap(-1, 0, pages*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	if _, err := f.Register(uffd.RangeOf(mem), uffd.RegisterMissing); err != nil {
		return err
	}
	go serveOwn(f, uffd.RangeOf(mem))
	go func() {
		for {
			runtime.GC()
		}
	}()
	page := make([]byte, pageSize)
	for i := range pages {
		here := mem[i*pageSize:][:pageSize]
		if access == "populate" {
			if err := uffd.Populate(here, i%2 == 0); err != nil {
				return err
			}
		}
		copy(page, here)
		if want := bytes.Repeat([]byte{byte(i + 1)}, pageSize); !bytes.Equal(page, want) {
			return fmt.Errorf("page %d holds %d", i, page[0])
		}
		os.Stdout.WriteString(".\n")
	}
	os.Exit(0)
	return nil
}

// TestFaultsInTheSameProcess shows the hazard that the package's doc tells of,
// and that Populate is free of it.
func TestFaultsInTheSameProcess(t *testing.T) {
	uffdtest.RequireAllFaults(t)
	const pages = 64
	run := func(access string, patience time.Duration) (faults int) {
		cmd := uffdtest.Command("populate", "UFFD_TEST_ACCESS="+access, "GOMAXPROCS=1")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(patience, func() { cmd.Process.Kill() })
		for lines := bufio.NewScanner(out); lines.Scan(); {
			faults++
		}
		timer.Stop()
		if err := cmd.Wait(); err != nil && faults == pages {
			t.Errorf("%s: %v", access, err)
		}
		return faults
	}
	if n := run("populate", uffdtest.Patience); n != pages {
		t.Errorf("Populate: %d of %d pages", n, pages)
	}
	if n := run("copy", 2*time.Second); n == pages {
		t.Error("copy ran through; the package's doc says that it hangs")
	}
}
