// Package pager serves the page faults of other processes from a source.
//
// A [Client] is a userfaultfd, mostly received from the process that opened it,
// with the regions of memory behind it. Whatever is touched in a region is read
// from the region's [source.Source] and installed:
//
//	image, err := source.OpenFile("memory.img")
//	...
//	var p pager.Pager
//	c, err := p.Attach(file, pager.Region{Range: memory, Source: image})
//	...
//	err = c.Serve(ctx) // until the process is gone
//
// One Pager has any number of clients, each with a Serve of its own; none holds
// up another. The memory is registered by whoever opened the userfaultfd, or
// with [uffd.File.Register] by whoever calls Attach: for missing pages, also for
// minor faults if the region has Memory, also for write protection if it has
// BeforeWrite. Memory without BeforeWrite may be registered with
// [uffd.RegisterRWP]: whoever protects pages from accesses does that for reasons
// of his own, and the pager lifts the protection for the first thread that waits.
//
// # What a page holds
//
// A page that is touched for the first time gets the bytes of the source; those
// behind the source's end are zeros. After the process discarded a page
// (MADV_DONTNEED, MADV_REMOVE, MADV_FREE) it reads zeros, like any memory. Memory
// that moves (mremap) takes its contents along, and a child (fork) has what its
// parent has. For that the userfaultfd needs [Events], the features that
// announce it; what a process does without them goes unnoticed. On shared memory
// the kernel does not tell MADV_DONTNEED from MADV_REMOVE: a page that is
// discarded before it was ever touched reads zeros after either. Parent and
// child do not learn what the other one discards in memory that they share, except
// pages of a region with Memory that one of them had touched. Of a huge page of
// which only a part is discarded (MADV_REMOVE), the rest stays what it was.
//
// The kernel announces that memory was moved or unmapped after the fact. If
// another thread has moved memory to the same address meanwhile, the events can
// come in the wrong order, and the pager takes the one for the other. A process
// whose threads do that must not reuse addresses at once.
//
// # Sources that wait
//
// Bytes in memory (see [source.Borrower]) go straight from there to the
// process, at once and without allocation. All other sources are read by worker
// goroutines, so that a read that takes seconds delays its own page only, as
// long as fewer than Workers of them are under way in one client.
//
// # Sources that fail
//
// A read that fails is tried again for a while. Then the page is poisoned, which
// means SIGBUS for whoever touches it, or, where the kernel is older than Linux
// 6.6, the thread is left waiting; either is reported as a [*PageError]. There are
// no zeros in place of data, unless [Pager.OnFailure] says so. A ReadAt that panics,
// or ends its goroutine ([runtime.Goexit], which is what FailNow of a test does),
// is a failed read. Other functions of the caller that end the goroutine, such as
// Borrow, BeforeWrite and ErrorHook, end Serve with an error.
//
// # Ahead of the faults
//
// A fault brings in pages around it, as long as that pays. [Client.Populate]
// installs everything, and [Client.Graduate] lets go of it then. What one process
// touched can be recorded ([Client.StartRecording]) and kept in a file ([Record]),
// and for the next process with the same memory be replayed before it asks
// ([Client.Replay]). Faults come before all of that.
//
// # Who holds the descriptor
//
// When the last descriptor of a userfaultfd is closed, missing memory silently
// reads as zeros. So let the process itself, or one that outlives the pager, keep
// a duplicate: when the pager dies, threads that touch missing memory wait then.
// Neither Serve nor Close closes the File that Attach was given; those of forked
// children, which nobody else has, are the pager's.
//
// # Taking over
//
// Between two calls of Serve a Client knows what its pages hold. A new Client
// does not: it takes every page that is missing for one that was never touched,
// and gives it the bytes of the source even if it was discarded. To go on in
// another process, after an update or after the pager was killed, attach with
// [Pager.AttachState], and have a keeper hold the state's file and a duplicate of
// the userfaultfd: the process that is served, or one that starts pagers, such as
// systemd with its file descriptor store. Without the duplicate the death of the
// pager closes the last descriptor, and missing memory reads as zeros; without the
// file the next pager brings back what was discarded. The keeper does not have to
// do anything with them but pass them to the next pager, once the one before is
// gone: kill(2) returns earlier, wait(2) does not. To hand over in peace, end
// Serve and Close; but kill -9 will do.
//
// The next client wakes all threads that wait, so that they ask again, and gives
// each page what the one before would have given it. Pages that were being read,
// or had failed and were held, are read anew. Stats, a recording, and a Populate
// that was under way are not kept.
//
// No event is lost, at whatever instruction the pager died: the kernel forgets an
// event when it is read, but copies it to the state in the same system call, and
// it stays there until it has been dealt with. (The kernel can fail to copy if it
// has to wait for that page of memory. It is locked, so that would take a move of
// the page by the kernel at the very moment in which the process is being killed.)
// As long as nobody serves, threads that fault, discard, move, unmap or fork wait:
// a restart takes as long as to start a process and to look through the state.
//
// Children are the exception. Their userfaultfds are made when the event of the
// fork is read, and die with the pager: what they have not touched reads as zeros
// then. The next client reports [ErrChildrenLost].
package pager
