package uffd

import (
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The way of kernels before 5.14 works on all.
func TestPopulateOld(t *testing.T) {
	size := os.Getpagesize()
	for _, write := range []bool{false, true} {
		mem, err := unix.Mmap(-1, 0, 4*size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Munmap(mem)
		f, err := New(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if only, _ := f.UserModeOnly(); !only {
			// Pages come from a handler, with the flags of the access.
			if _, err := f.Register(RangeOf(mem), RegisterMissing); err != nil {
				t.Fatal(err)
			}
			go func() {
				for page := range 4 {
					m, err := f.ReadMsg()
					if err != nil {
						t.Error(err)
						return
					}
					p, _ := m.Pagefault()
					if p.Flags != 0 { // the read that comes first
						t.Errorf("page %d: %v", page, &m)
					}
					src := make([]byte, size)
					src[0], src[size-1] = 5, 6
					if _, err := f.Copy(p.Addr, src, 0); err != nil {
						t.Error(err)
					}
				}
			}()
		} else {
			for i := 0; i < len(mem); i += size {
				mem[i], mem[i+size-1] = 5, 6
			}
		}
		start, length := wholePages(mem)
		if e := populateOld(start, length, write); e != 0 {
			t.Fatal(e)
		}
		for i := 0; i < len(mem); i += size {
			if mem[i] != 5 || mem[i+size-1] != 6 {
				t.Errorf("page %d holds %d, %d", i/size, mem[i], mem[i+size-1])
			}
		}
		if write {
			testNoLostWrites(t, mem)
		}
	}
	// What cannot be populated is an error.
	mem, err := unix.Mmap(-1, 0, 2*size, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	start, _ := wholePages(mem)
	if e := populateOld(start, uintptr(size), true); e != unix.EFAULT {
		t.Errorf("writing to a read-only page: %v, want EFAULT", e)
	}
	unix.Munmap(mem)
	if e := populateOld(start, uintptr(size), false); e != unix.EFAULT {
		t.Errorf("reading an unmapped page: %v, want EFAULT", e)
	}
}

// testNoLostWrites populates while another thread counts in the same word.
func testNoLostWrites(t *testing.T, mem []byte) {
	word := (*uint32)(unsafe.Pointer(&mem[0]))
	*word = 0
	const n = 20000
	var wg sync.WaitGroup
	wg.Go(func() {
		for range n {
			atomic.AddUint32(word, 1)
		}
	})
	for range n / 10 {
		if e := writePage(unsafe.Pointer(&mem[0])); e != 0 {
			t.Fatal(e)
		}
	}
	wg.Wait()
	if *word != n {
		t.Errorf("counted %d of %d: populating lost writes", *word, n)
	}
}
