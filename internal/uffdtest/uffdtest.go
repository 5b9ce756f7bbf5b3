// Package uffdtest is what the tests of this module share: gates for what a
// kernel or a user may lack, a process whose memory faults, and settings of the
// system that are put back.
package uffdtest
