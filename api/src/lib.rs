//! REST types, client and wire protocol of Dunlin.
