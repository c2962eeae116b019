// Package sheaf scatters blocks of an input over the replicas of a serverless
// function and gathers their results: scatter–gather, broadcast and
// point-to-point messages between functions on OpenFaaS.
//
// The whole of it, for a caller, is three lines:
//
//	blocks := sheaf.SplitLines(body, 64<<10)
//	results := group.Scatter(ctx, blocks)
//	answer, err := sheaf.Reduce(results, decode, merge)
//
// # Words
//
// A block is a piece of the input with an index. A replica is one running
// instance of a function. A view is the list of the ready replicas of one
// function at one epoch; the place of a replica in it is its rank, the length
// of the list the size. A route carries one block to one replica and brings
// its reply; an attempt is one such call. A [Group] scatters over the replicas
// of one function.
//
// # What is promised
//
// A gather is complete, or it says what is missing. Each block of the input
// yields exactly one [Result], or the error that ends the iteration is a
// [*PartialError] that names the blocks that are missing and why. Handlers may
// run more than once for one block (after a fault, or as a hedge against a
// straggler); of several answers for a block the first one counts, once.
//
// A broadcast is complete by membership, never by a timer: it ends when every
// replica of one view has answered or is known to be gone.
//
// # Iterators
//
// Blocks and results are iterators ([iter.Seq2]). Leaving a loop over results
// cancels what is still running and waits for it, so nothing leaks. Nothing in
// this package holds the whole input: at most [Group.Limit] blocks are held at
// once, and a slow consumer of results slows the reading of the input down.
//
// The package imports the standard library only. Routes and resolvers live in
// packages of their own (direct, gateway, registry).
package sheaf
