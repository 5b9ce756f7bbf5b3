// Package track finds out which pages of a process's memory are written, and
// copies memory as it is at one moment.
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
// A [Snapshot] is a copy of memory of another process at one moment, made while
// that process goes on.
//
// [Pagemap] is PAGEMAP_SCAN itself, for whatever else it can tell.
package track
