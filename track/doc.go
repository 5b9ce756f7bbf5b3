// Package track finds out which pages of a process's memory are written, or used
// at all, and copies memory as it is at one moment.
//
// A [Writes] watches memory of another process, or of this one:
//
//	w, err := track.Start(f, pid, ranges...)
//	if err != nil {
//		return err
//	}
//	defer w.Stop()
//	for {
//		for r, err := range w.Collect() {
//			if err != nil {
//				return err
//			}
//			// somebody has written to r since it was collected last
//		}
//	}
//
// f is a userfaultfd that the process has opened with [Open], or with the
// features that [Open] asks for, and sent here.
//
// With FeatureWPAsync (Linux 6.7) the kernel keeps the books, writers are never
// held up, and Collect asks with PAGEMAP_SCAN. Before that, from Linux 5.7 on,
// each first write to a page is a fault that the Writes answers. [Writes.Method]
// says which of the two it is.
//
// An [Accesses] finds in the same way which pages are read or written: the working
// set (FeatureRWPAsync, Linux 7.3, on amd64, arm64 and some riscv64). Before that
// no userfaultfd tells who reads a page that is there. What is left is Writes, for
// the part of the working set that is written, and package track/evict, which
// bounds how much memory there is, and finds what is used by taking it away, or,
// from Linux 7.3 on, by the accesses.
//
// A [Snapshot] is a copy of memory of another process at one moment, made while
// that process goes on.
//
// [Pagemap] is PAGEMAP_SCAN itself, for whatever else it can tell.
package track
