// Bench measures how fast page faults are served, side by side with C: package
// uffd and package pager against a plain loop around read(2) and ioctl(2).
//
//	go run . -docs ../docs         # everything, about twenty minutes
//	go run . -run '^copy' -docs '' # some of it
//	go run . -quick -docs ''       # only to see that it works
//
// Client and handler are processes of their own. The client, in C, touches its
// memory page by page, measures how long each fault takes, and checks what it
// finds. The handlers take turns, for a few tenths of a second each, so that what
// else the machine does hits all alike; what is printed are medians of the ratios
// within a turn.
//
// What package track does is measured in the same way, at both ends: how long the
// tracker takes to protect memory and to collect which pages were written, and how
// long writes take meanwhile.
//
//	go run . -run '^(collect|start|write|snapshot)' -docs ../docs # only that
//
// The C programs are in the folder c and are compiled when the benchmark runs, so
// it needs gcc. It needs root for everything: hugetlb memory, priorities, faults
// in kernel mode.
//
// What is measured is kept in a file, -results. A workload that is there already
// is not measured again.
package main
