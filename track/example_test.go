package track_test

import (
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/track"
)

// Sample the working set: how much memory is used in each second.
func ExampleStartAccesses() {
	var f *uffd.File      // opened with OpenAccesses by another process, and sent here
	var pid int           // of that process
	var memory uffd.Range // in it

	a, err := track.StartAccesses(f, pid, memory)
	if err != nil {
		log.Fatal(err)
	}
	defer a.Stop()
	for {
		time.Sleep(time.Second)
		var used uint64
		for r, err := range a.Collect() {
			if errors.Is(err, uffd.ErrGone) {
				return // the process has exited
			}
			if err != nil {
				log.Fatal(err)
			}
			used += r.Len
		}
		fmt.Printf("%d of %d bytes\n", used, memory.Len)
	}
}

// Find out whether the kernel can tell accesses.
func ExampleOpenAccesses() {
	f, err := track.OpenAccesses()
	if errors.Is(err, errors.ErrUnsupported) {
		fmt.Println("only writes can be tracked:", err) // before Linux 7.3
		return
	}
	if err != nil {
		log.Fatal(err)
	}
	defer f.Close()
}
